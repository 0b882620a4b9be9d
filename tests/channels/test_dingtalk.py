"""The channel of DingTalk against its stand-in: what is received, answered, sent, and refused."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from channel_tools import FakeTools, channels, receiving
from clock import FakeClock
from depth import by_depth
from fake_dingtalk import ROBOT, FakeDingTalk
from junk import mutated
from waiting import eventually

Json = Any


@pytest.fixture
def clock() -> FakeClock:
    """The clock of connections and tokens."""
    return FakeClock()


@pytest.fixture
def dingtalk(clock: FakeClock) -> Iterator[FakeDingTalk]:
    with FakeDingTalk(clock) as running:
        yield running


@pytest.fixture
def tools(dingtalk: FakeDingTalk) -> FakeTools:
    return FakeTools(**dingtalk.settings())


@pytest.fixture
def channel(tools: FakeTools, clock: FakeClock) -> Iterator[Any]:
    http = channels.Http(channels.Connector("", {}))
    yield channels.DingTalk(tools, http, clock)
    http.close()


@pytest.fixture
def running(dingtalk: FakeDingTalk, channel: Any, tools: FakeTools) -> Iterator[Any]:
    """The channel, while it receives."""
    with receiving(channel, tools):
        eventually(lambda: dingtalk.connections)
        yield channel


def part(text: str) -> Any:
    return channels.Part(text, True, "0123456789abcdef0123")


def understood(channel: Any, data: Json) -> Any:
    """The message that the channel sees in the data of a frame."""
    return channel._message(data)


def route_of(dingtalk: FakeDingTalk, channel: Any, *where: str, **fields: Json) -> Json:
    """Where the answer to a message goes."""
    return understood(channel, dingtalk.message(
        *where, text={"content": "x"}, msgtype="text", **fields)).route


def kind_of_failure(call: Any) -> str:
    """The kind of failure that a call ends with."""
    with pytest.raises(channels.SendFailed) as failed:
        call()
    return str(failed.value.kind)


# -- connections ----------------------------------------------------------------------------------

def test_a_probe_says_which_app_it_is(channel: Any, dingtalk: FakeDingTalk) -> None:
    assert channel.probe() == f"app {ROBOT}"
    channel.probe()
    assert dingtalk.tokens == 1


@pytest.mark.parametrize(("status", "words"), [(400, "publish"), (401, "copy both")])
def test_a_refused_app_is_told_with_what_to_do(
    dingtalk: FakeDingTalk, channel: Any, status: int, words: str
) -> None:
    dingtalk.fail("POST", "open", status, {"code": "x", "message": "why\x07"})
    with pytest.raises(channels.Fatal, match=r"\(why\?\)") as fatal:
        channel.run()
    assert words in fatal.value.fix


@pytest.mark.parametrize(("status", "body"), [
    (500, {}), (200, "<html>"), (200, {"ticket": "t"}), (200, {"endpoint": "ws://8.8.8.8",
                                                             "ticket": "t"}),
    (200, {"endpoint": "ws://127.0.0.1:9", "ticket": "t"})])
def test_no_connection_is_a_reason_to_try_again(
    dingtalk: FakeDingTalk, channel: Any, status: int, body: Json
) -> None:
    dingtalk.fail("POST", "open", status, body)
    with pytest.raises(channels.Retry):
        channel.run()


def test_no_token_is_a_reason_to_try_again(dingtalk: FakeDingTalk, channel: Any) -> None:
    dingtalk.fail("POST", "accessToken", 200, {"expireIn": "x"})
    dingtalk.fail("POST", "accessToken", 503)
    for _ in range(2):
        with pytest.raises(channels.Retry):
            channel.probe()
    assert channel.probe()
    channel._root = "http://127.0.0.1:9"
    channel._token.forget()
    with pytest.raises(channels.Retry):
        channel.probe()


def test_a_ping_of_the_platform_gets_its_data_back(running: Any, dingtalk: FakeDingTalk) -> None:
    frame = dingtalk.system("ping", {"opaque": "7"})
    answer = eventually(lambda: dingtalk.answers.get(frame))
    assert answer["code"] == 200 and json.loads(answer["data"]) == {"opaque": "7"}


def test_events_and_strange_topics_are_answered_as_not_known(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools
) -> None:
    frames = [dingtalk.system("chat_update", kind="EVENT"), dingtalk.emit({}, topic="/card")]
    dingtalk.system("KEEPALIVE")
    eventually(lambda: all(each in dingtalk.answers for each in frames))
    assert {dingtalk.answers[each]["code"] for each in frames} == {404}
    assert not tools.messages and not dingtalk.faults


def test_what_comes_while_the_platform_changes_the_connection_is_received(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools, clock: FakeClock
) -> None:
    old = dingtalk.connections[0]
    clock.advance(10)
    dingtalk.system("disconnect")
    eventually(lambda: len(dingtalk.connections) == 2)
    dingtalk.emit(dingtalk.message(text={"content": "by the old one"}, msgtype="text"), peer=old)
    dingtalk.say("by the new one")
    eventually(lambda: sorted(tools.texts()) == ["by the new one", "by the old one"])
    eventually(lambda: not dingtalk.unanswered)
    old.close(1000)
    dingtalk.say("later")
    eventually(lambda: "later" in tools.texts())
    assert not tools.ends and not dingtalk.faults


def test_a_platform_that_always_wants_another_connection_is_not_hurried(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools
) -> None:
    dingtalk.system("disconnect")
    eventually(lambda: tools.ends)
    assert isinstance(tools.ends[0], channels.Retry)


def test_an_hour_without_a_message_earns_another_connection(
    dingtalk: FakeDingTalk, channel: Any, tools: FakeTools, clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_DINGTALK_PING_S", 0.01)
    with receiving(channel, tools):
        eventually(lambda: dingtalk.connections)
        clock.advance(3601)
        eventually(lambda: len(dingtalk.connections) == 2)
    assert not tools.ends


def test_a_connection_that_gives_no_sign_is_given_up(
    dingtalk: FakeDingTalk, channel: Any, tools: FakeTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_DINGTALK_PING_S", 0.01)
    monkeypatch.setattr(channels, "_DINGTALK_GONE_S", 0.5)
    with receiving(channel, tools):
        eventually(lambda: dingtalk.connections)
        # A pong is a sign: it lasts for longer than that.
        assert not tools.ends
        monkeypatch.setattr(channels.WebSocket, "ping", lambda self: None)
        eventually(lambda: len(dingtalk.connections) > 1)
    assert "has gone silent" in str(tools.ends[0])


@pytest.mark.parametrize("text", ["", "[]", "no JSON", "{}", '{"type": "CALLBACK"}',
                                  '{"headers": 7, "type": "SYSTEM"}', "9" * 5000])
def test_a_frame_in_no_known_form_does_not_end_the_connection(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools, text: str
) -> None:
    dingtalk.garbage(text)
    dingtalk.say("still there")
    eventually(lambda: tools.texts() == ["still there"])
    assert not tools.ends


# -- messages -------------------------------------------------------------------------------------

def test_a_message_is_answered_when_it_is_safe_and_comes_again_until_then(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools
) -> None:
    tools.failure = OSError("disk full")
    dingtalk.say(" hello")
    eventually(lambda: tools.ends)
    assert not tools.messages and dingtalk.unanswered
    eventually(lambda: len(dingtalk.connections) == 2)
    dingtalk.send_again()
    eventually(lambda: not dingtalk.unanswered)
    dingtalk.emit({**dingtalk.message(), "msgId": tools.messages[0].id,
                   "text": {"content": "hello"}, "msgtype": "text"})
    first, second = eventually(lambda: len(tools.messages) == 2 and tools.messages)
    assert first.id == second.id and first.text == "hello"
    assert {answer["data"] for answer in dingtalk.answers.values()} == {'{"response":"OK"}'}


def test_a_direct_message_is_for_the_robot(dingtalk: FakeDingTalk, channel: Any) -> None:
    found = understood(channel, dingtalk.message(
        "staff1", text={"content": " hello "}, msgtype="text"))
    assert (found.kind, found.chat, found.sender, found.sender_name, found.text) == (
        "direct", "staff1", "staff1", "Person staff1", "hello")
    assert found.is_mentioned and found.group == found.place == ""
    assert abs(found.at_s - time.time()) < 60


def test_a_message_in_a_group_belongs_to_the_group(dingtalk: FakeDingTalk, channel: Any) -> None:
    data = dingtalk.message("staff1", "cidG", text={"content": "hi"}, msgtype="text")
    found = understood(channel, data)
    assert (found.kind, found.chat, found.group, found.is_mentioned) == (
        "group", "cidG", "cidG", True)
    assert not understood(channel, {**data, "isInAtList": False}).is_mentioned
    assert understood(channel, {**data, "senderStaffId": None}).sender == "$:staff1"


RICH = {"richText": [{"text": "see "}, {"downloadCode": "d1", "type": "picture"},
                     {"text": "this\n"}, {"text": "now"}]}


@pytest.mark.parametrize(("fields", "text", "files"), [
    ({"msgtype": "richText", "content": RICH}, "see this\nnow", [("image", "picture", "d1")]),
    ({"msgtype": "richText", "content": json.dumps(RICH)}, "see this\nnow",
     [("image", "picture", "d1")]),
    ({"msgtype": "picture", "content": {"downloadCode": "d"}}, "", [("image", "picture", "d")]),
    ({"msgtype": "audio", "content": {"downloadCode": "d", "recognition": "spoken"}}, "spoken",
     []),
    ({"msgtype": "audio", "content": {"downloadCode": "d"}}, "", [("file", "audio", "d")]),
    ({"msgtype": "file", "content": {"downloadCode": "d", "fileName": "a\x00.pdf"}}, "",
     [("file", "a?.pdf", "d")]),
    ({"msgtype": "video", "content": {"downloadCode": "d", "videoType": "mp4"}}, "",
     [("file", "video", "d")]),
])
def test_each_kind_of_message_is_text_or_a_file(
    dingtalk: FakeDingTalk, channel: Any, fields: Json, text: str, files: Json
) -> None:
    found = understood(channel, dingtalk.message(**fields))
    assert found.text == text
    assert [(each.kind, each.name, each.ref["downloadCode"]) for each in found.attachments] == files


@pytest.mark.parametrize("replied", [
    {"msgType": "text", "content": {"text": "before"}},
    {"msgType": "text", "content": '{"text": "before"}'},
    {"msgType": "richText", "content": {"richText": [{"text": "be"}, {"text": "fore"}]}}])
def test_a_quoted_message_comes_along(
    dingtalk: FakeDingTalk, channel: Any, replied: Json
) -> None:
    found = understood(channel, dingtalk.message(
        msgtype="text", text={"content": "and?", "isReplyMsg": True, "repliedMsg": replied}))
    assert (found.text, found.quoted) == ("and?", "before")


@pytest.mark.parametrize("fields", [
    {"senderId": "$:bot", "msgtype": "text", "text": {"content": "x"}},
    {"msgtype": "text", "text": {"content": " "}}])
def test_what_no_person_says_is_no_message(
    dingtalk: FakeDingTalk, channel: Any, fields: Json
) -> None:
    assert understood(channel, dingtalk.message(**fields)) is None


def test_a_card_is_named() -> None:
    found = channels.dingtalk_content({"msgtype": "interactiveCard", "content": {}}, "r")
    assert found == ("[interactiveCard]", "", ())


def test_no_message_of_any_form_stops_the_next_one(
    running: Any, dingtalk: FakeDingTalk, tools: FakeTools
) -> None:
    chance = random.Random(5)
    good = dingtalk.message("staff1", "cidG", msgtype="richText", content=RICH, text={
        "repliedMsg": {"msgType": "text", "content": {"text": "before"}}})
    for _ in range(by_depth(100, 200, 1000)):
        dingtalk.emit(mutated(copy.deepcopy(good), chance))
    dingtalk.say("still there")
    eventually(lambda: "still there" in tools.texts())
    eventually(lambda: not dingtalk.unanswered)
    assert not tools.ends


# -- sending --------------------------------------------------------------------------------------

def test_an_answer_goes_to_the_address_that_came_with_its_message(
    dingtalk: FakeDingTalk, channel: Any
) -> None:
    channel.send(route_of(dingtalk, channel), part("# Title\none\ntwo"))
    assert dingtalk.screen("staff1") == ["# Title  \none  \ntwo"]
    body = dingtalk.calls[-1].body
    assert body["markdown"]["title"] == "Title" and "at" not in body and not dingtalk.tokens


def test_a_person_in_a_group_is_called_by_the_first_part(
    dingtalk: FakeDingTalk, channel: Any
) -> None:
    route = route_of(dingtalk, channel, "staff1", "cidG")
    channel.send({**route, "is_reply": True}, part("hi"))
    channel.send({**route, "is_reply": False}, part("more"))
    assert dingtalk.screen("cidG") == ["@staff1  \nhi", "more"]
    assert dingtalk.called_by_name == ["staff1"]


@pytest.mark.parametrize("group", ["", "cidG"])
@pytest.mark.parametrize("how", ["gone", "too old", "not theirs", "none", "broken"])
def test_without_an_address_an_answer_goes_by_the_api(
    dingtalk: FakeDingTalk, channel: Any, group: str, how: str
) -> None:
    fields: Json = {"too old": {"sessionWebhookExpiredTime": 1},
                    "not theirs": {"sessionWebhook": "https://dingtalk.com.example/x"},
                    "none": {"sessionWebhook": None}}.get(how, {})
    route = route_of(dingtalk, channel, "staff1", group, **fields)
    if how == "gone":
        dingtalk.expire()
    if how == "broken":
        dingtalk.fail("POST", "sendBySession", 200, "<html>")
    channel.send(route, part("hi"))
    assert dingtalk.screen(group or "staff1") == ["hi"]


@pytest.mark.parametrize(("url", "is_taken"), [
    ("https://oapi.dingtalk.com/robot/x", True), ("http://oapi.dingtalk.com/x", False),
    ("https://evildingtalk.com/x", False), ("https://127.0.0.1/x", False),
    ("https://oapi.dingtalk.com@example.com/", False)])
def test_only_an_address_of_dingtalk_gets_an_answer(
    dingtalk: FakeDingTalk, url: str, is_taken: bool
) -> None:
    channel = channels.DingTalk(FakeTools(clientId="1", clientSecret="2"), None)
    assert bool(route_of(dingtalk, channel, sessionWebhook=url)["webhook"]) == is_taken


def test_a_stranger_to_the_company_is_answered_with_his_next_message(
    dingtalk: FakeDingTalk, channel: Any
) -> None:
    route = route_of(dingtalk, channel, senderStaffId=None)
    dingtalk.expire()
    assert kind_of_failure(lambda: channel.send(route, part("hi"))) == "held"


def test_a_token_that_ends_before_its_time_costs_no_answer(
    dingtalk: FakeDingTalk, channel: Any, clock: FakeClock
) -> None:
    channel.probe()
    dingtalk.tokens += 1
    channel.send(route_of(dingtalk, channel, sessionWebhook=None), part("hi"))
    assert dingtalk.screen("staff1") == ["hi"]
    clock.advance(6901)
    channel.send(route_of(dingtalk, channel, sessionWebhook=None), part("hi"))
    assert dingtalk.tokens == 4


@pytest.mark.parametrize(("path", "status", "body", "kind"), [
    ("sendBySession", 200, {"errcode": 130101, "errmsg": "too fast"}, "later"),
    ("sendBySession", 200, {"errcode": 460101, "errmsg": "too long"}, "never"),
    ("sendBySession", 502, "<html>", "later"), ("sendBySession", 429, {}, "later"),
    ("batchSend", 403, {"code": "Forbidden.AccessDenied.QpsLimitForApi"}, "wait"),
    ("batchSend", 400, {"code": "x", "message": "no"}, "never"),
    ("batchSend", 500, {}, "later"), ("batchSend", 200, {}, "never"),
    ("batchSend", 200, {"processQueryKey": "k", "invalidStaffIdList": ["staff1"]}, "never"),
    ("batchSend", 200, {"processQueryKey": "k", "flowControlledStaffIdList": ["x"]}, "later"),
    ("accessToken", 401, {"code": "x"}, "later"), ("accessToken", 500, {}, "later"),
])
def test_what_follows_a_refusal(
    dingtalk: FakeDingTalk, channel: Any, path: str, status: int, body: Json, kind: str
) -> None:
    fields: Json = {} if path == "sendBySession" else {"sessionWebhook": None}
    route = route_of(dingtalk, channel, **fields)
    dingtalk.fail("POST", path, status, body)
    assert kind_of_failure(lambda: channel.send(route, part("hi"))) == kind


def test_a_network_that_fails_is_tried_again(dingtalk: FakeDingTalk, channel: Any) -> None:
    route = {**route_of(dingtalk, channel), "webhook": "http://127.0.0.1:9/"}
    assert kind_of_failure(lambda: channel.send(route, part("hi"))) == "later"


@pytest.mark.parametrize("letter", ["\u4e2d", "\U0001f600", '"', "\\", "\n"])
@pytest.mark.parametrize("has_address", [True, False])
def test_a_part_of_any_letters_is_within_the_limit(
    dingtalk: FakeDingTalk, channel: Any, letter: str, has_address: bool
) -> None:
    def fits(text: str) -> bool:
        return channel.length(channel.render(text)) <= channels.DingTalk.row.limit

    longest = channels.split_markdown(f"a{letter * 5000}b", fits)[0]
    fields: Json = {} if has_address else {"sessionWebhook": None}
    channel.send(route_of(dingtalk, channel, **fields), part(longest))
    assert len(dingtalk.screen("staff1")) == 1


@pytest.mark.parametrize(("markdown", "shown"), [
    ("one\ntwo\n\nthree", "one  \ntwo  \n  \nthree"),
    ("```py\na\nb\n```\nend", "```py\na\nb\n```  \nend"), ("> a\n> b", "> a  \n> b"),
    ("| a | b |\n|---|---|\n| 1 | 2 |", "a: 1  \nb: 2"),
    ("~~no~~ **yes** ![p](https://x.y/z)", "no **yes** [p](https://x.y/z)"),
])
def test_lines_end_where_they_should(channel: Any, markdown: str, shown: str) -> None:
    assert channel.render(markdown) == shown


@pytest.mark.parametrize("is_theirs", [True, False])
def test_a_file_comes_byte_for_byte_from_the_platform_alone(
    dingtalk: FakeDingTalk, channel: Any, is_theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dingtalk.files["a.pdf"] = b"data"
    dingtalk.downloads["d"] = f"{dingtalk.url}/files/a.pdf"
    found = understood(channel, dingtalk.message(
        msgtype="file", content={"downloadCode": "d", "fileName": "a.pdf"})).attachments[0]
    monkeypatch.setattr(channels, "is_local", lambda url: is_theirs)
    if is_theirs:
        assert channel.fetch(found, 100) == b"data"
        with pytest.raises(ValueError):
            channel.fetch(found, 3)
        dingtalk.downloads["d"] += "x"
        assert kind_of_failure(lambda: channel.fetch(found, 100)) == "never"
    assert kind_of_failure(lambda: channel.fetch(found, 100)) == ("never" if is_theirs else "later")
    dingtalk.downloads["d"] = "ftp://x"
    monkeypatch.setattr(channels, "is_local", lambda url: False)
    assert kind_of_failure(lambda: channel.fetch(found, 100)) == "never"


# -- login ----------------------------------------------------------------------------------------

class Screen(channels.Console):  # type: ignore[name-defined,misc]
    """A terminal that keeps what it shows."""

    def __init__(self) -> None:
        self.links: list[str] = []

    def show_link(self, url: str) -> None:
        self.links.append(url)


WAITING = {"errcode": 0, "status": "WAITING"}


@pytest.mark.parametrize(("states", "why"), [
    ([], None), ([WAITING, {"errcode": 0, "status": "FAIL"}, WAITING], None),
    ([{"errcode": 40035}, {"errcode": 0, "status": "EXPIRED"}], None),
    ([{"errcode": 0, "status": "FAIL", "fail_reason": "no right"}] * 100, "no right"),
    ([WAITING] * 100, "timed out"),
])
def test_a_login_makes_an_app(
    dingtalk: FakeDingTalk, tools: FakeTools, monkeypatch: pytest.MonkeyPatch,
    states: list[Json], why: Optional[str]
) -> None:
    monkeypatch.setattr(channels, "_DINGTALK_POLL_S", 0)
    dingtalk.login_states = list(states)
    channel = channels.DingTalk(tools, channels.Http(channels.Connector("", {})),
                                FakeClock(step_s=5))
    screen = Screen()
    if why is None:
        assert channel.login(screen) == {"clientId": ROBOT, "clientSecret": dingtalk.secret}
    else:
        with pytest.raises(channels.Fatal, match=why):
            channel.login(screen)
    channel.http.close()
    assert screen.links == ["https://oapi.dingtalk.com/scan?code=d1"]


def test_a_login_that_is_not_offered_says_what_to_do(
    dingtalk: FakeDingTalk, channel: Any
) -> None:
    dingtalk.fail("POST", "init", 500, {})
    with pytest.raises(channels.Fatal) as fatal:
        channel.login(Screen())
    assert "open-dev.dingtalk.com" in fatal.value.fix


# -- settings -------------------------------------------------------------------------------------

def test_an_account_is_logged_in_by_a_command(
    dingtalk: FakeDingTalk, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_DINGTALK_POLL_S", 0)
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"channels": {"dingtalk": {"oapiEndpoint": dingtalk.url}}}))
    assert channels.main(["login", "--channel", "dingtalk"],
                         {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}) == 0
    saved = json.loads(path.read_text())["channels"]["dingtalk"]
    assert (saved["clientId"], saved["clientSecret"]) == (ROBOT, dingtalk.secret)
    assert "https://oapi.dingtalk.com/scan" in capsys.readouterr().out


def test_accounts_of_the_original_file_work(dingtalk: FakeDingTalk) -> None:
    content = {"channels": {"dingtalk-connector": {
        "enabled": True, "clientId": "${APP}", "clientSecret": {"source": "env", "id": "SECRET"},
        "dmPolicy": "open", "allowFrom": ["*"], "groupPolicy": "open", "requireMention": True,
        "groupSessionScope": "group_sender",
        "accounts": {"ops": {"clientId": "ding2", "clientSecret": "s2"}}}}}
    environ = {"APP": "ding1", "SECRET": "s1"}
    found = channels.parse_settings(content, "none", environ, [channels.DingTalk.row])
    assert [(each.id, each.settings["clientId"], each.settings["clientSecret"])
            for each in found.accounts] == [
        ("dingtalk-connector:default", "ding1", "s1"), ("dingtalk-connector:ops", "ding2", "s2")]
    data = dingtalk.message("staff1", "cidG", text={"content": "x"}, msgtype="text")
    channel = channels.DingTalk(FakeTools(**found.accounts[0].settings), None)
    lane = channels.lane_of(found.accounts[0], understood(channel, data))
    assert lane == "dingtalk-connector:default:group:cidG:staff1"
