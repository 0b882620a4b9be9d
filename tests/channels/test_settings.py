"""The file of settings: precedence, and every fault at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Optional

import pytest

from channel_rows import ROW, channels

EXAMPLE = {
    "_comment": "an example",
    "agentUrl": "http://192.168.1.5:11434/v1",
    "channels": {
        "_note": "the channels",
        "telegram": {"_about": "x", "enabled": True, "botToken": "YOUR_BOT_TOKEN_HERE"},
        "made-up": {"enabled": True, "accounts": {"ops": {"token": "t1"}}},
    },
}


def load(tmp_path: Path, content: Any, environ: Optional[Mapping[str, str]] = None) -> Any:
    path = tmp_path / "channels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    content = channels.read_file(str(path))
    return channels.parse_settings(content, str(path), environ or {}, [ROW, *channels.ROWS])


def errors_of(tmp_path: Path, content: Any) -> list[str]:
    with pytest.raises(channels.SettingsError) as failed:
        load(tmp_path, content)
    return list(failed.value.errors)


def test_an_example_with_comments_is_read_and_says_what_is_missing(tmp_path: Path) -> None:
    settings = load(tmp_path, EXAMPLE)
    assert [(each.id, each.missing) for each in settings.accounts] == [
        ("telegram:default", ("botToken",)), ("made-up:ops", ())]
    assert settings.top["agentUrl"] == "http://192.168.1.5:11434/v1/chat/completions"
    assert not settings.warnings


@pytest.mark.parametrize("key", ["agentUrl", "model", "apiKey"])
def test_account_goes_before_channel_top_environment_and_default(tmp_path: Path, key: str) -> None:
    variable = {"agentUrl": "OCG_AGENT_URL", "model": "OCG_MODEL", "apiKey": "OCG_API_KEY"}[key]
    values = [f"http://h{n}/v1/chat/completions" for n in range(4)]
    account: dict[str, Any] = {"token": "t1", key: values[0]}
    channel: dict[str, Any] = {key: values[1], "accounts": {"a": account}}
    content: dict[str, Any] = {key: values[2], "channels": {"made-up": channel}}
    environ = {variable: values[3]}
    found = []
    for level in (None, account, channel, content, environ):
        if level is not None:
            del level[variable if level is environ else key]
        one = load(tmp_path, content, environ).accounts[0]
        found.append((one.settings[key], one.origins[key]))
    default = {"agentUrl": channels.DEFAULT_AGENT_URL, "model": "sonnet", "apiKey": ""}[key]
    assert [value for value, _ in found] == [*values, default]
    assert [origin for _, origin in found] == [
        "account", "channel", "file", "environment", "default"]


def test_every_fault_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, {
        "maxTurns": 0, "proxy": "socks5://x", "agentUrl": "ftp://x", "channels": {
            "telegram": {"botToken": "a", "dmPolicy": "opn", "apiRoot": "http://example.com"},
            "made-up": {"accounts": {"a": {"token": "same"}, "b": {"token": "same"},
                                     "c d": {}, "e": {"token": "e", "dmPolicy": "open"}}},
            "nothing": {}}})
    told = "\n".join(errors)
    for expected in (
        "maxTurns: 0; use a whole number from 1 to 100", "a socks proxy is not supported",
        'agentUrl: "ftp://x"', 'channels.telegram.dmPolicy: "opn"; use pairing, allowlist, open',
        'channels.telegram.apiRoot: "http://example.com"; use an https address',
        "made-up:b: made-up:a has the same token", "channels.made-up.accounts.c d:",
        'channels.made-up.accounts.e.dmPolicy: "open"', "channels.nothing: no such channel",
    ):
        assert expected in told, told


@pytest.mark.parametrize(("top", "channel"), [
    ({"apiKey": ["hidden-1"]}, {}), ({"callbackSecret": {"a": "hidden-1"}}, {}),
    ({"proxy": "socks5://me:hidden-1@proxy"}, {}), ({}, {"token": ["hidden-1"]}),
    ({"agentUrl": "http://me:hidden-1@agent"}, {}),
])
def test_an_error_does_not_show_what_is_secret(tmp_path: Path, top: Any, channel: Any) -> None:
    told = "\n".join(errors_of(tmp_path, {**top, "channels": {"made-up": channel}}))
    assert told and "hidden-1" not in told


def test_what_stands_at_the_wrong_level_is_told(tmp_path: Path) -> None:
    assert errors_of(tmp_path, {"allowFrom": ["1"], "channels": {
        "made-up": {"token": "t", "callbackSecret": "x"}}}) == [
        "allowFrom: not used here; it belongs in a channel",
        "channels.made-up.callbackSecret: not used here; it belongs at the top level"]
    settings = load(tmp_path, {"replyToMode": "off", "channels": {"made-up": {"token": "t"}}})
    assert settings.warnings == ("replyToMode: not used here; it belongs in a channel",)


def test_an_account_is_off_however_that_is_written(tmp_path: Path) -> None:
    for value in (False, "false", 0):
        content = {"channels": {"made-up": {"token": "t", "enabled": value}}}
        assert not load(tmp_path, content).accounts[0].is_enabled


def test_the_default_account_has_one_place(tmp_path: Path) -> None:
    content = {"channels": {"made-up": {"token": "a", "accounts": {"default": {"token": "b"}}}}}
    assert "keep one of the two" in errors_of(tmp_path, content)[0]


@pytest.mark.parametrize(("place", "told"), [
    ({"allowfrom": ["1"]}, "7.allowfrom: did you mean allowFrom?"),
    ({"channels": {"70": {"user": ["1"]}}}, "70.user: did you mean users?"),
    ("open", "7: use an object, true or false"),
])
def test_a_word_that_would_close_a_group_is_not_overlooked(
    tmp_path: Path, place: Any, told: str
) -> None:
    content = {"channels": {"telegram": {"botToken": "t", "groups": {"_x": "comment", "7": place}}}}
    assert told in "\n".join(errors_of(tmp_path, content))


@pytest.mark.parametrize(("values", "expected"), [
    ({"dmPolicy": "allowlist"}, "allowFrom: name at least one person"),
    ({"dmPolcy": "open"}, "did you mean dmPolicy?"),
    ({"allowfrom": ["1"]}, "did you mean allowFrom?"),
])
def test_what_would_open_a_bot_by_mistake_is_an_error(
    tmp_path: Path, values: Any, expected: str
) -> None:
    content = {"channels": {"made-up": {"token": "t", **values}}}
    assert expected in "\n".join(errors_of(tmp_path, content))


def test_a_file_that_is_no_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    assert "not JSON at line 2, column" in errors_of(tmp_path, '{\n"a" 1}')[0]


def test_a_key_is_not_sent_to_an_address_of_another_level(tmp_path: Path) -> None:
    settings = load(tmp_path, {"apiKey": "global", "channels": {
        "made-up": {"accounts": {
            "own": {"token": "a", "agentUrl": "https://other.example"},
            "both": {"token": "b", "agentUrl": "https://other.example", "apiKey": "mine"},
            "none": {"token": "c"}}}}})
    keys = {each.name: each.settings["apiKey"] for each in settings.accounts}
    assert keys == {"own": "", "both": "mine", "none": "global"}
    assert "no key is sent there" in settings.warnings[0]


@pytest.mark.parametrize("value", [
    "${BOT}", {"source": "env", "id": "BOT"}, {"source": "file", "path": "FILE"},
])
def test_a_credential_may_stand_elsewhere(tmp_path: Path, value: Any) -> None:
    (tmp_path / "token").write_text("from afar\n")
    if isinstance(value, dict) and "path" in value:
        value = {**value, "path": str(tmp_path / "token")}
    content = {"channels": {"made-up": {"token": value}}}
    one = load(tmp_path, content, {"BOT": "from afar"}).accounts[0]
    assert one.settings["token"] == "from afar"


def test_the_token_of_telegram_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("1:abc\n")
    content = {"channels": {"telegram": {"tokenFile": str(tmp_path / "token")}}}
    assert load(tmp_path, content).accounts[0].settings["botToken"] == "1:abc"


def test_the_environment_has_the_credentials_of_the_default_account(tmp_path: Path) -> None:
    content = {"channels": {"made-up": {}}}
    assert load(tmp_path, content, {"MADE_UP_TOKEN": "t"}).accounts[0].settings["token"] == "t"


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    load(tmp_path, EXAMPLE)
    (tmp_path / "channels.json").chmod(0o644)
    settings = channels.parse_settings(EXAMPLE, str(tmp_path / "channels.json"), {},
                                       [ROW, *channels.ROWS])
    assert "other users can read it" in settings.warnings[0]


LOGIN_ROW = ROW._replace(credentials={}, has_login=True)


@pytest.mark.parametrize(("row", "before", "account", "after"), [
    (ROW, {}, "default", {"enabled": True, "k": 1}),
    (ROW, {}, "a", {"enabled": True, "accounts": {"a": {"k": 1}}}),
    (ROW, {"made-up": {"token": "t"}}, "default", {"token": "t", "k": 1}),
    (ROW, {"made-up": {"token": "t"}}, "a", {"token": "t", "accounts": {"a": {"k": 1}}}),
    (ROW, {"mu": {"accounts": {"a": {}}}}, "default",
     {"accounts": {"a": {}, "default": {"k": 1}}}),
    (LOGIN_ROW, {"made-up": {}}, "a", {"accounts": {"default": {}, "a": {"k": 1}}}),
    (LOGIN_ROW, {}, "a", {"enabled": True, "accounts": {"a": {"k": 1}}}),
])
def test_an_account_that_is_added_takes_none_away(
    row: Any, before: Any, account: str, after: Any
) -> None:
    content, had_any = {"channels": before}, bool(before)
    channels.merge_account(content, row, account, {"k": 1})
    assert list(content["channels"].values()) == [after]
    names = [each.name for each in channels.parse_settings(content, "", {}, [row]).accounts]
    if row is LOGIN_ROW:
        assert account in names and ("default" in names) == had_any
