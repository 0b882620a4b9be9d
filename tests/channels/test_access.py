"""Who may talk to a bot."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_rows import account, channels, message


class Now:
    """A clock that the test sets."""

    s = 1_000_000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def store(tmp_path: Path, now: Now) -> Iterator[Any]:
    made = channels.Store(str(tmp_path / "channels.db"), now)
    yield made
    made.close()


@pytest.fixture
def access(store: Any, now: Now) -> Any:
    return channels.Access(store, now)


def code_in(text: str) -> str:
    found = re.search(r"Code ([A-Z2-9]{8});", text)
    assert found, text
    return found[1]


def test_a_stranger_gets_one_code_an_hour(access: Any, now: Now) -> None:
    first = access.judge(account(), message())
    assert first.reason and code_in(first.reply) and "your id is 1000" in first.reply
    assert access.judge(account(), message()).reply == ""
    now.s += 3601
    assert code_in(access.judge(account(), message()).reply) != code_in(first.reply)


def test_the_fourth_stranger_who_waits_is_ignored(access: Any) -> None:
    replies = [access.judge(account(), message(sender=str(n))).reply for n in range(4)]
    assert [bool(reply) for reply in replies] == [True, True, True, False]


def test_the_first_who_is_approved_owns_the_account(access: Any) -> None:
    codes = [code_in(access.judge(account(), message(sender=each)).reply) for each in "12"]
    owner, friend = (access.approve(code.lower(), is_owner=False) for code in codes)
    assert (owner["is_owner"], friend["is_owner"]) == (1, 0)
    assert not any(access.judge(account(), message(sender=each)).reason for each in "12")


def test_an_approval_is_told_and_can_be_revoked(access: Any, store: Any) -> None:
    code = code_in(access.judge(account(), message()).reply)
    access.approve(code, is_owner=False)
    assert "may write" in store.rows("SELECT text FROM outbox")[0]["text"]
    assert access.revoke("made-up:default", "1000")
    assert access.judge(account(), message()).reason
    assert not access.revoke("made-up:default", "2000")


@pytest.mark.parametrize("code", ["", "AAAAAAAA"])
def test_a_code_that_nobody_has_lets_nobody_in(access: Any, code: str) -> None:
    access.judge(account(), message())
    assert access.approve(code, is_owner=True) is None


def test_a_code_is_worthless_after_an_hour(access: Any, now: Now) -> None:
    code = code_in(access.judge(account(), message()).reply)
    now.s += 3601
    assert access.approve(code, is_owner=False) is None


@pytest.mark.parametrize(("values", "is_allowed"), [
    ({"dmPolicy": "disabled", "allowFrom": ["1000"]}, False),
    ({"dmPolicy": "allowlist", "allowFrom": ["made-up", "telegram:1000"]}, True),
    ({"dmPolicy": "allowlist", "allowFrom": ["2000"]}, False),
    ({"dmPolicy": "open", "allowFrom": ["*"]}, True),
    ({"allowFrom": ["1000"]}, True),
])
def test_the_policy_of_direct_messages(access: Any, values: Any, is_allowed: bool) -> None:
    verdict = access.judge(account(**values), message())
    assert bool(verdict.reason) != is_allowed
    assert not verdict.reply


@pytest.mark.parametrize(
    ("policy", "is_listed", "may_sender", "is_mentioned"),
    list(itertools.product(("allowlist", "open", "disabled"), *[(True, False)] * 3)))
def test_a_group_message_needs_its_place_its_sender_and_a_mention(
    access: Any, policy: str, is_listed: bool, may_sender: bool, is_mentioned: bool
) -> None:
    one = account(groupPolicy=policy, groups={"-5" if is_listed else "-6": {}},
                  groupAllowFrom=["1000"] if may_sender else ["7"])
    written = message(chat="-5", kind="group", group="-5", place="-5", is_mentioned=is_mentioned)
    is_place_good = policy == "open" or policy == "allowlist" and is_listed
    expected = is_place_good and may_sender and is_mentioned
    assert bool(access.judge(one, written).reason) != expected


def test_an_approved_person_is_not_let_into_groups_by_that(access: Any) -> None:
    access.approve(code_in(access.judge(account(), message()).reply), is_owner=True)
    written = message(chat="-5", kind="group", group="-5", is_mentioned=True)
    assert access.judge(account(groups=["*"]), written).reason == "not in groupAllowFrom"


def test_channels_of_a_guild_are_a_list_of_what_is_allowed(access: Any) -> None:
    one = account(guilds={"9": {"requireMention": True, "channels": {
        "1": {"requireMention": False}, "2": True, "3": False}}}, allowFrom=["1000"])
    def verdict(place: str) -> str:
        written = message(chat=place, kind="channel", group="9", place=place, is_mentioned=False)
        return str(access.judge(one, written).reason)

    assert [verdict(place) for place in "1234"] == [
        "", "not mentioned", "the channel is not listed", "the channel is not listed"]


@pytest.mark.parametrize(("place", "reason"), [
    ({"allowFrom": ["1000"]}, ""), ({"users": [1000]}, ""),
    ({"users": ["7"]}, "not in groupAllowFrom"), ({"users": []}, "not in groupAllowFrom"),
    ({"users": ["7"], "channels": {"1": {"users": ["1000"]}}}, ""),
    ({"allowFrom": None}, "not in groupAllowFrom"), ({}, ""),
])
def test_a_place_with_a_list_of_its_own_lets_in_nobody_else(
    access: Any, place: Any, reason: str
) -> None:
    one = account(guilds={"9": place}, groupAllowFrom=["*"])
    written = message(chat="1", kind="group", group="9", place="1", is_mentioned=True)
    assert access.judge(one, written).reason == reason


def test_what_was_counted_while_the_clock_was_wrong_refuses_nobody(
    access: Any, store: Any, now: Now
) -> None:
    one = account(allowFrom=["*"], dmPolicy="open", perSenderHour=1)
    now.s += 1e8
    store.put_in(one.id, "lane", message(), is_done=True)
    now.s -= 1e8
    assert not access.judge(one, message()).reason


@pytest.mark.parametrize(("most", "is_owner"), [(2, True), (0, False)])
def test_the_owner_and_an_account_without_a_limit_are_never_refused(
    access: Any, store: Any, most: int, is_owner: bool
) -> None:
    one = account(allowFrom=["*"], dmPolicy="open", perSenderHour=most)
    store.run("INSERT INTO people VALUES (?,'1000','','{}','','',?,0)", one.id, is_owner)
    for number in range(100):
        assert access.judge(one, message(id=str(number))) == channels.Verdict()
        store.put_in(one.id, "lane", message(), is_done=True)


@pytest.mark.parametrize("values", [
    {}, {"allowFrom": []}, {"groupAllowFrom": []}, {"allowFrom": ["1000"], "groupAllowFrom": []},
    {"allowFrom": ["*"], "groupAllowFrom": []}, {"groups": {"*": {"allowFrom": []}}},
])
def test_an_empty_list_is_nobody_however_open_a_group_is(access: Any, values: Any) -> None:
    written = message(chat="-5", kind="group", group="-5", place="-5", is_mentioned=True)
    one = account(groupPolicy="open", requireMention=False, **values)
    assert access.judge(one, written).reason == "not in groupAllowFrom"


def test_beyond_the_limit_of_an_hour_one_sentence_and_then_silence(
    access: Any, store: Any, now: Now
) -> None:
    one = account(allowFrom=["*"], dmPolicy="open", perSenderHour=2)
    replies = []
    for number in range(5):
        verdict = access.judge(one, message(id=str(number)))
        replies.append(verdict.reply)
        if not verdict.reason or verdict.is_counted:
            store.put_in(one.id, "lane", message(), is_done=True)
    assert [bool(reply) for reply in replies] == [False, False, True, False, False]
    now.s += 3601
    assert not access.judge(one, message()).reason
