"""The channel of WeChat against its stand-in: the login, what is received, sent, and refused."""

from __future__ import annotations

import base64
import copy
import json
import random
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from aes import BOX, encrypt_block, encrypted, round_keys
from channel_tools import FakeTools, channels, receiving
from clock import FakeClock
from depth import by_depth
from fake_wechat import BUDGET, OWNER, FakeWeChat
from junk import mutated
from waiting import eventually

Json = Any
KEY = bytes(range(16))


@pytest.fixture
def wechat() -> Iterator[FakeWeChat]:
    with FakeWeChat() as running:
        yield running


@pytest.fixture
def tools(wechat: FakeWeChat) -> FakeTools:
    made = FakeTools(**wechat.settings())
    made.states.append(wechat.login())
    return made


@pytest.fixture
def channel(tools: FakeTools) -> Iterator[Any]:
    http = channels.Http(channels.Connector("", {}))
    yield channels.WeChat(tools, http, FakeClock())
    http.close()


def part(text: str, nonce: str = "0123456789abcdef0123") -> Any:
    return channels.Part(text, True, nonce)


@pytest.fixture
def heard(wechat: FakeWeChat, channel: Any, tools: FakeTools) -> Any:
    """A message that may be answered."""
    with receiving(channel, tools):
        wechat.say("hello")
        return eventually(lambda: tools.messages)[0]


def kind_of_failure(call: Any) -> str:
    """The kind of failure that a call ends with."""
    with pytest.raises(channels.SendFailed) as failed:
        call()
    return str(failed.value.kind)


# -- AES ------------------------------------------------------------------------------------------

def test_the_example_of_the_standard_is_read() -> None:
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    whole = encrypted(block, KEY)
    assert whole[:16].hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
    assert channels.aes_decrypted(whole, KEY) == block
    assert channels.aes_s_box() == bytes(BOX)
    assert channels.aes_round_keys(KEY) == [bytes(each) for each in round_keys(KEY)]


def test_texts_of_every_length_are_read() -> None:
    chance = random.Random(7)
    for size in [*range(34), 1000]:
        data, key = chance.randbytes(size), chance.randbytes(16)
        assert channels.aes_decrypted(encrypted(data, key), key) == data


@pytest.mark.parametrize("data", [
    b"", b"x" * 15, b"x" * 16, encrypt_block(bytes(16), round_keys(KEY)),
    encrypt_block(b"\x11" * 16, round_keys(KEY)), encrypt_block(b"\1\2" * 8, round_keys(KEY))])
def test_what_is_not_encrypted_so_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        channels.aes_decrypted(data, KEY)
    with pytest.raises(ValueError):
        channels.aes_decrypted(b"x" * 16, b"short")


# -- receiving ------------------------------------------------------------------------------------

def test_an_account_without_a_login_says_which_command_to_run(wechat: FakeWeChat) -> None:
    channel = channels.WeChat(FakeTools(**wechat.settings()), None)
    for call in (channel.run, channel.probe):
        with pytest.raises(channels.Fatal) as fatal:
            call()
        assert fatal.value.needs_login and "login --channel openclaw-weixin" in fatal.value.fix


def test_a_probe_says_which_bot_it_is(wechat: FakeWeChat, channel: Any) -> None:
    assert channel.probe() == "bot bot1@im.bot" and wechat.notices == ["msg/notifystart"]


def test_a_message_is_acknowledged_by_the_next_poll(
    wechat: FakeWeChat, channel: Any, tools: FakeTools
) -> None:
    with receiving(channel, tools):
        wechat.say("one")
        eventually(lambda: tools.states[-1].get("buffer") == "place1")
        wechat.say("two", sender="anna@im.wechat")
        eventually(lambda: tools.states[-1].get("buffer") == "place2")
    first, second = tools.messages
    assert (first.kind, first.chat, first.sender, first.sender_name, first.text) == (
        "direct", OWNER, OWNER, "owner", "one")
    assert first.id == "7500000000000000001" and first.is_mentioned and second.text == "two"
    assert set(tools.states[-1]["tokens"]) == {OWNER, "anna@im.wechat"}
    assert wechat.notices == ["msg/notifystart", "msg/notifystop"]
    assert not tools.ends and not wechat.faults


def test_a_message_that_is_not_safe_comes_again(
    wechat: FakeWeChat, channel: Any, tools: FakeTools
) -> None:
    tools.failure = OSError("disk full")
    with receiving(channel, tools):
        wechat.say("hello")
        eventually(lambda: tools.messages)
        assert tools.texts() == ["hello"] and isinstance(tools.ends[0], OSError)
        eventually(lambda: tools.states[-1].get("buffer") == "place1")


def test_a_login_that_is_over_is_told_after_a_second_try(
    wechat: FakeWeChat, channel: Any, tools: FakeTools
) -> None:
    wechat.token = "another"
    with receiving(channel, tools):
        eventually(lambda: len(tools.ends) == 2)
    assert isinstance(tools.ends[0], channels.Retry)
    assert isinstance(tools.ends[1], channels.Fatal) and tools.ends[1].needs_login


def test_a_login_that_a_notice_mends_goes_on(
    wechat: FakeWeChat, channel: Any, tools: FakeTools
) -> None:
    wechat.fail("POST", "getupdates", 200, {"errcode": -14})
    with receiving(channel, tools):
        wechat.say("hello")
        eventually(lambda: tools.messages)
    assert [str(each) for each in tools.ends] == ["refused"]


def test_a_new_login_is_not_overwritten_by_what_the_old_one_received(
    wechat: FakeWeChat, channel: Any, tools: FakeTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll, new = channel._poll, wechat.login(bot_token="token-of-the-new-login")

    def polled(state: Json) -> Json:
        answer = poll(state)
        tools.states.append(new)
        return answer

    monkeypatch.setattr(channel, "_poll", polled)
    wechat.say("hello")
    with pytest.raises(channels.Retry, match="a new login was made"):
        channel.run()
    assert tools.state() == new and not tools.messages


def test_every_third_failure_earns_a_long_pause(wechat: FakeWeChat, channel: Any) -> None:
    pauses = []
    for body in ({"ret": 5}, {"errcode": "x"}, "<html>", {"ret": 1}):
        wechat.fail("POST", "getupdates", 200, body)
        with pytest.raises(channels.Retry) as retry:
            channel.run()
        pauses.append(retry.value.after_s)
    assert pauses == [2.0, 2.0, 30.0, 2.0]


def test_a_server_that_gives_no_sign_is_asked_again(
    wechat: FakeWeChat, channel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_WECHAT_SLACK_S", 0.05)
    channel._hold_s = 0.05
    with pytest.raises(channels.Retry, match="timed out"):
        channel.run()


IMAGE = {"type": 2, "image_item": {"media": {"full_url": "u"}}}


@pytest.mark.parametrize(("items", "text", "files"), [
    ([{"type": 1, "text_item": {"text": "a "}}, IMAGE], "a", [("image", "photo.jpg", 0)]),
    ([{"type": 3, "voice_item": {"text": "spoken"}}], "spoken", []),
    ([{"type": 3, "voice_item": {"media": {}}}], "", [("file", "voice", 0)]),
    ([{"type": 4, "file_item": {"file_name": "a\x00.pdf", "len": "77", "media": {}}}], "",
     [("file", "a?.pdf", 77)]),
    ([{"type": 5, "video_item": {"media": {}}}], "", [("file", "video", 0)]),
])
def test_each_kind_of_item_is_text_or_a_file(
    channel: Any, items: list[Json], text: str, files: Json
) -> None:
    found = channel._message({"from_user_id": "a@b", "item_list": items, "message_id": 1})
    assert found.text == text
    assert [(each.kind, each.name, each.size_bytes) for each in found.attachments] == files


TEXT = {"type": 1, "text_item": {"text": "x"}}


@pytest.mark.parametrize("fields", [
    {"message_type": 2}, {"group_id": "g"}, {"item_list": []}, {"item_list": [{"type": 11}]}])
def test_what_no_person_says_directly_is_no_message(channel: Any, fields: Json) -> None:
    assert channel._message({"from_user_id": "a", "item_list": [TEXT], **fields}) is None


@pytest.mark.parametrize(("fields", "item", "expected"), [
    ({"message_id": 9}, {"msg_id": 5}, "9"), ({"message_id": "9"}, {}, "9"),
    ({}, {"msg_id": 5}, "5")])
def test_a_message_is_known_by_its_id_or_that_of_its_item(
    channel: Any, fields: Json, item: Json, expected: str
) -> None:
    found = {"from_user_id": "a", "item_list": [{**TEXT, **item}], **fields}
    assert channel._message(found).id == expected


def test_a_message_without_an_id_is_known_by_what_it_says(channel: Any) -> None:
    found = {"from_user_id": "a", "item_list": [TEXT], "create_time_ms": 1}
    assert channel._message(found).id == channel._message(copy.deepcopy(found)).id
    assert channel._message(found).id != channel._message({**found, "create_time_ms": 2}).id


@pytest.mark.parametrize(("quote", "quoted"), [
    ({"title": "before"}, "before"), ({"message_item": TEXT}, "x"),
    ({"title": "A", "message_item": TEXT}, "A\nx"), ({"svr_id": "7"}, "")])
def test_a_quoted_message_comes_along(channel: Any, quote: Json, quoted: str) -> None:
    found = {"from_user_id": "a", "item_list": [{**TEXT, "ref_msg": quote}]}
    assert channel._message(found).quoted == quoted


def test_no_message_of_any_form_stops_the_next_one(
    wechat: FakeWeChat, channel: Any, tools: FakeTools
) -> None:
    chance = random.Random(9)
    good = wechat.emit([{**TEXT, "ref_msg": {"title": "t", "message_item": TEXT}},
                        wechat.photo(b"data", KEY)])
    wechat.messages = [mutated(copy.deepcopy(good), chance)
                       for _ in range(by_depth(100, 200, 1000))]
    with receiving(channel, tools):
        wechat.say("still there")
        eventually(lambda: "still there" in tools.texts())
    assert not tools.ends


# -- sending --------------------------------------------------------------------------------------

def test_an_answer_goes_with_the_newest_token_of_its_person(
    wechat: FakeWeChat, channel: Any, tools: FakeTools, heard: Any
) -> None:
    channel.send(heard.route, part("**hi** [a](https://b.c)", "nonce1"))
    tools.stop.clear()
    with receiving(channel, tools):
        wechat.say("again")
        eventually(lambda: len(tools.messages) == 2)
    channel.send(heard.route, part("##### more", "nonce2"))
    assert wechat.screen(OWNER) == ["**hi** a (https://b.c)", "**more**"]
    assert wechat.client_ids == ["nonce1", "nonce2"] and not wechat.faults


def test_an_eleventh_answer_waits_for_the_next_message(
    wechat: FakeWeChat, channel: Any, heard: Any
) -> None:
    for number in range(BUDGET):
        channel.send(heard.route, part(f"part {number}"))
    assert kind_of_failure(lambda: channel.send(heard.route, part("eleventh"))) == "held"


def test_nothing_is_sent_without_a_token(wechat: FakeWeChat, channel: Any) -> None:
    route = {"to": "anna@im.wechat", "run": "r"}
    assert kind_of_failure(lambda: channel.send(route, part("hi"))) == "held"
    assert not wechat.calls


@pytest.mark.parametrize(("status", "body", "kind"), [
    (200, {"ret": -2}, "held"), (200, {"ret": -14}, "later"), (200, {"errcode": 7}, "later"),
    (200, "<html>", "later"), (500, {}, "later"), (429, {}, "later")])
def test_what_follows_a_refusal(
    wechat: FakeWeChat, channel: Any, heard: Any, status: int, body: Json, kind: str
) -> None:
    wechat.fail("POST", "sendmessage", status, body)
    assert kind_of_failure(lambda: channel.send(heard.route, part("hi"))) == kind


def test_a_network_that_fails_is_tried_again(
    channel: Any, heard: Any, tools: FakeTools
) -> None:
    tools.states.append({**tools.state(), "base_url": "http://127.0.0.1:9"})
    assert kind_of_failure(lambda: channel.send(heard.route, part("hi"))) == "later"
    assert channel.probe() == "bot bot1@im.bot"


def test_typing_is_shown_until_it_is_over(wechat: FakeWeChat, channel: Any, heard: Any) -> None:
    channel.type(heard.route, is_over=True)
    channel.type(heard.route)
    channel.type(heard.route)
    channel.type(heard.route, is_over=True)
    channel.type(heard.route, is_over=True)
    assert wechat.typed == [(OWNER, 1), (OWNER, 1), (OWNER, 2)]
    assert len(wechat.called("POST", "getconfig")) == 1 and not wechat.faults


@pytest.mark.parametrize("where", [
    {}, {"aeskey": None, "media": {"aes_key": base64.b64encode(KEY).decode()}},
    {"aeskey": "", "media": {"aes_key": base64.b64encode(KEY.hex().encode()).decode()}}])
@pytest.mark.parametrize("has_url", [True, False])
def test_a_photo_comes_byte_for_byte(
    wechat: FakeWeChat, channel: Any, where: Json, has_url: bool
) -> None:
    data = b"\xff\xd8\xff" + bytes(range(256))
    item = wechat.photo(data, KEY)
    media = {**item["image_item"]["media"], **where.get("media", {})}
    if has_url:
        media = {**media, "encrypt_query_param": None,
                 "full_url": f"{wechat.url}/files/{next(iter(wechat.files))}"}
    item["image_item"].update({**where, "media": media})
    found = channel._message({"from_user_id": "a", "item_list": [item]}).attachments[0]
    assert channel.fetch(found, len(data)) == data
    with pytest.raises(ValueError):
        channel.fetch(found, 100)


def test_a_file_without_a_key_is_not_encrypted(wechat: FakeWeChat, channel: Any) -> None:
    wechat.files["a"] = b"data"
    item = {"type": 4, "file_item": {"media": {"full_url": f"{wechat.url}/files/a"}}}
    found = channel._message({"from_user_id": "a", "item_list": [item]}).attachments[0]
    assert channel.fetch(found, 100) == b"data"


def test_a_file_is_not_fetched_from_the_own_network(channel: Any, wechat: FakeWeChat) -> None:
    channel._login_root = "https://example.com"
    for url, kind in ((f"{wechat.url}/files/a", "never"), ("https://127.0.0.1/x", "later")):
        found = channels.Attachment("image", "a", "", 0, {"url": url, "key": ""})
        assert kind_of_failure(lambda found=found: channel.fetch(found, 9)) == kind


# -- login ----------------------------------------------------------------------------------------

class Screen(channels.Console):  # type: ignore[name-defined,misc]
    """A terminal that keeps what it shows, and types numbers."""

    def __init__(self, *numbers: str) -> None:
        self.links: list[str] = []
        self.said: list[str] = []
        self.numbers = list(numbers)

    def show_link(self, url: str) -> None:
        self.links.append(url)

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, question: str) -> str:
        self.said.append(question)
        return self.numbers.pop(0)


@pytest.fixture
def new(wechat: FakeWeChat, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A channel that is not logged in."""
    monkeypatch.setattr(channels, "_WECHAT_POLL_S", 0)
    http = channels.Http(channels.Connector("", {}))
    yield channels.WeChat(FakeTools(**wechat.settings()), http, FakeClock(step_s=5))
    http.close()


def test_a_login_brings_the_state_and_the_owner(wechat: FakeWeChat, new: Any) -> None:
    wechat.fail("GET", "get_qrcode_status", 524, "<html>")
    wechat.login_states = [
        {"status": "wait"}, {"status": "scaned"}, {"status": "scaned"},
        {"status": "scaned_but_redirect", "redirect_host": wechat.url.partition("//")[2]},
        {"status": "scaned_but_redirect"}]
    screen = Screen()
    assert new.login(screen) == {**wechat.login(), "owner": OWNER, "buffer": "", "tokens": {}}
    assert screen.links == ["https://liteapp.weixin.qq.com/q/1"]
    assert screen.said == ["Scan it with WeChat.", "Scanned; confirm it on the phone."]
    assert not wechat.faults


def test_a_login_asks_for_the_number_on_the_phone(wechat: FakeWeChat, new: Any) -> None:
    seen: list[Optional[str]] = []

    def asked(query: Json) -> Json:
        seen.append(query.get("verify_code"))
        return {"status": "scaned" if query.get("verify_code") == "22" else "need_verifycode"}

    wechat.login_states = [asked, asked, asked]
    screen = Screen("1 1", "22")
    assert new.login(screen)["bot_token"] == wechat.token
    assert seen == [None, "1 1", "22"]
    assert [each for each in screen.said if "wrong" in each] == [
        "That number is wrong. Which number does the phone show?"]


@pytest.mark.parametrize(("ends", "codes"), [
    (["expired"], 2), (["expired", "verify_code_blocked"], 3), (["expired"] * 3, 3)])
def test_a_login_shows_three_codes(
    wechat: FakeWeChat, new: Any, ends: list[str], codes: int
) -> None:
    wechat.login_states = [{"status": each} for each in ends]
    if len(ends) < 3:
        assert new.login(Screen())["owner"] == OWNER
    else:
        with pytest.raises(channels.Fatal, match="login not confirmed"):
            new.login(Screen())
    assert wechat.codes_shown == codes


def test_a_login_ends_in_time(wechat: FakeWeChat, new: Any) -> None:
    wechat.login_states = [{"status": "wait"}] * 200
    with pytest.raises(channels.Fatal, match="in time"):
        new.login(Screen())


@pytest.mark.parametrize("state", [
    {"status": "scaned_but_redirect", "redirect_host": "qq.com.example"},
    {"status": "scaned_but_redirect", "redirect_host": "evilqq.com"},
    {"status": "scaned_but_redirect", "redirect_host": "x@example.com"},
    {"status": "confirmed", "bot_token": "t", "ilink_user_id": "u", "baseurl": "http://qq.com"},
    {"status": "confirmed", "bot_token": "t", "ilink_user_id": "u",
     "baseurl": "https://example.com/qq.com"},
])
def test_a_login_leads_to_no_other_host(wechat: FakeWeChat, new: Any, state: Json) -> None:
    wechat.login_states = [state]
    with pytest.raises(channels.Fatal, match="which is not WeChat"):
        new.login(Screen())


@pytest.mark.parametrize("host", ["ilinkai.weixin.qq.com", "szminorshort.weixin.wechat.com"])
def test_a_login_may_lead_to_hosts_of_wechat(new: Any, host: str) -> None:
    assert new._checked(f"https://{host}/") == f"https://{host}"


def test_a_bot_that_is_bound_keeps_its_login(
    wechat: FakeWeChat, new: Any, tools: FakeTools
) -> None:
    wechat.login_states = [{"status": "binded_redirect"}] * 4
    with pytest.raises(channels.Fatal):
        new.login(Screen())
    new.tools = tools
    assert new.login(Screen()) == {}
    assert wechat.calls[-2].body["local_token_list"] == [wechat.token]


@pytest.mark.parametrize("is_same", [True, False])
def test_what_was_received_is_forgotten_with_another_bot(
    wechat: FakeWeChat, new: Any, tools: FakeTools, is_same: bool
) -> None:
    new.tools = tools
    wechat.bot_id = wechat.bot_id if is_same else "bot2@im.bot"
    assert ("buffer" in new.login(Screen())) != is_same


def test_a_login_that_is_not_offered_is_told(wechat: FakeWeChat, new: Any) -> None:
    for body in ("<html>", {"ret": 1}):
        wechat.fail("POST", "get_bot_qrcode", 200, body)
        with pytest.raises(channels.Fatal, match="offers no login"):
            new.login(Screen())


# -- settings -------------------------------------------------------------------------------------

def test_an_account_of_the_original_file_works() -> None:
    content = {"channels": {"openclaw-weixin": {
        "enabled": True, "baseUrl": "https://ilinkai.weixin.qq.com", "botAgent": "Mine/1.0",
        "cdnBaseUrl": "https://novac2c.cdn.weixin.qq.com/c2c", "accounts": {"b1-im-bot": {
            "name": "mine", "enabled": True}}}}}
    found = channels.parse_settings(content, "none", {}, [channels.WeChat.row])
    assert [(each.id, each.missing) for each in found.accounts] == [
        ("openclaw-weixin:b1-im-bot", ())]
    assert not found.warnings and found.accounts[0].settings["botAgent"] == "Mine/1.0"


def test_a_login_is_kept_in_the_database_and_not_in_the_file(
    wechat: FakeWeChat, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_WECHAT_POLL_S", 0)
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"channels": {"wechat": wechat.settings()}}))
    environ = {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}
    assert channels.main(["login", "--channel", "wechat"], environ) == 0
    assert "https://liteapp.weixin.qq.com/q/1" in capsys.readouterr().out
    assert wechat.token not in path.read_text()
    assert channels.main(["pairing", "list"], environ) == 0
    assert OWNER in capsys.readouterr().out
