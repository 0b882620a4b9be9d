"""What an owner types."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

from channel_rows import channels
from fake_agent import FakeAgent, refused
from fake_discord import FakeDiscord
from fake_telegram import BOT_NAME, FakeTelegram
from gateway import Gateway
from waiting import eventually

Json = Any
PLUGIN = '''API = 1
def channel(api):
    class Echo(api.Channel):
        def run(self):
            self.tools.note_frame()
            self.tools.accept(api.Message("1", "c", "direct", "s", "S", "hello", True, "", (), 0,
                                          {}))
            self.tools.stop.wait()
        def send(self, route, part):
            open(self.tools.settings["file"], "w").write(part.text)
            return "1"
    return api.Row("echo", (), "Echo", Echo, 1000, {}, {"file": api.text_value})
'''


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """An empty home, and nothing that runs."""
    with FakeTelegram() as telegram, FakeAgent() as agent:
        made = Gateway(telegram, agent)
        try:
            yield made
        finally:
            made.run("stop")
            made.__exit__()


def all_have(count: int, *agents: FakeAgent) -> bool:
    """Whether each of these agents has been called so often."""
    return all(len(agent.headers) == count for agent in agents)


def add(gateway: Gateway, *more: str) -> str:
    """Add the fake bot, and return what was printed."""
    done = gateway.run("channels", "add", "--channel", "telegram", "--botToken",
                       gateway.telegram.token, "--apiRoot", gateway.telegram.url, *more)
    assert done.code == 0, done
    return done.stdout


def test_from_an_empty_home_to_an_answer_with_two_commands_and_one_approval(
    gateway: Gateway,
) -> None:
    telegram = gateway.telegram
    assert f"The bot is @{BOT_NAME}." in add(gateway)
    assert "Started: pid" in gateway.run(
        "start", "-d", env={"OCG_AGENT_URL": gateway.agent.url}).stdout
    telegram.say("hello", sender=77)
    code = re.search("Code (.{8});", eventually(lambda: telegram.screen(77))[0])
    assert code and not gateway.agent.requests
    assert "and owns the account" in gateway.run("pairing", "approve", code[1]).stdout
    eventually(lambda: len(telegram.screen(77)) == 2)
    telegram.say("hello", sender=77)
    eventually(lambda: telegram.screen(77)[2:] == ["You said: hello"])
    assert "owner" in gateway.run("pairing", "list").stdout
    assert gateway.run("pairing", "revoke", "telegram", "77").code == 0
    telegram.say("hello again", sender=77)
    eventually(lambda: "This bot is private" in telegram.screen(77)[-1])
    assert len(gateway.agent.requests) == 1


@pytest.mark.slow
def test_start_status_and_stop_from_several_shells(gateway: Gateway) -> None:
    assert gateway.run("status").code == 3 and gateway.run("stop").code == 3
    add(gateway)
    assert gateway.run("start", "-d").code == 0
    again = gateway.run("start", "-d")
    assert again.code == 1 and "runs already" in again.stderr
    foreground = gateway.run("start")
    assert foreground.code == 1 and "runs already" in foreground.stderr
    eventually(lambda: gateway.status()["channels"][0]["status"] == "running")
    text = gateway.run("status", "--probe").stdout
    assert "Channels configured: 1, running: 1" in text and f"@{BOT_NAME}" in text
    pid = gateway.status()["pid"]
    assert gateway.run("restart").code == 0
    assert gateway.status()["pid"] != pid
    assert gateway.run("channels", "stop").stdout == "Stopped.\n"
    assert gateway.run("status").code == 3


def test_one_channel_stops_and_starts_while_another_goes_on(gateway: Gateway) -> None:
    telegram = gateway.telegram
    with FakeDiscord() as discord:
        gateway.settings["channels"]["discord"] = {
            "token": discord.token, "apiRoot": discord.url, "allowFrom": ["1000"]}
        gateway.start()
        eventually(lambda: gateway.status()["running"] == 2)
        stop = ("channels", "stop", "--channel", "telegram")
        assert gateway.run(*stop).stdout == "Stopped: telegram:default\n"
        assert gateway.run(*stop).stdout.startswith("Nothing changed")
        asked = len(telegram.called("getUpdates"))
        telegram.say("while it was stopped")
        discord.say("hello")
        eventually(lambda: discord.screen(discord.dm("1000")) == ["You said: hello"])
        assert len(telegram.called("getUpdates")) == asked and not telegram.screen(1000)
        assert {each["id"]: each["status"] for each in gateway.status()["channels"]} == {
            "telegram": "stopped", "discord": "running"}
        assert gateway.run("start", "--channel", "telegram").stdout == (
            "Started: telegram:default\n")
        assert eventually(lambda: telegram.screen(1000) == ["You said: while it was stopped"])
        assert len(discord.connections) == 1


@pytest.mark.slow
def test_one_account_stops_and_starts_while_another_goes_on(gateway: Gateway) -> None:
    add(gateway)
    with FakeTelegram("1:another-token") as other:
        done = gateway.run("add", "--channel", "telegram", "--account", "ops", "--token",
                           other.token, "--apiRoot", other.url, "--allowFrom", '["5"]')
        assert done.code == 0, done
        assert gateway.run("start", "-d", env={"OCG_AGENT_URL": gateway.agent.url}).code == 0
        stop = ("channels", "stop", "--channel", "telegram", "--account", "default")
        assert gateway.run(*stop).stdout == "Stopped: telegram:default\n"
        other.say("hello", sender=5)
        eventually(lambda: other.screen(5) == ["You said: hello"])
        found = {each["accountId"]: each["status"] for each in gateway.status()["channels"]}
        assert found == {"default": "stopped", "ops": "running"}
        started = gateway.run("start", "--channel", "telegram")
        assert started.stdout == "Started: telegram:default\n"
        assert gateway.run("stop").code == 0


def test_add_keeps_what_the_file_has_and_a_copy_of_it(gateway: Gateway) -> None:
    path = gateway.home / "channels.json"
    before = {"zeta": 1, "_comment": "mine", "channels": {"_note": "x"}, "alpha": {"b": 2}}
    path.write_text(json.dumps(before))
    add(gateway)
    after = json.loads(path.read_text())
    assert list(after) == ["zeta", "_comment", "channels", "alpha"]
    assert list(after["channels"]) == ["_note", "telegram"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads((gateway.home / "channels.json.bak").read_text()) == before


def test_a_token_that_is_refused_is_not_saved(gateway: Gateway) -> None:
    done = gateway.run("add", "--channel", "telegram", "--token", "1:wrong", "--apiRoot",
                       gateway.telegram.url)
    assert done.code == 1 and "the token is refused" in done.stderr and "BotFather" in done.stderr
    assert not (gateway.home / "channels.json").exists()


def test_a_gateway_that_cannot_do_something_says_why_and_goes_on(tmp_path: Path) -> None:
    home, tried = tmp_path, []

    def perform(request: Json) -> Json:
        tried.append(request)
        if len(tried) == 1:
            raise OSError("channels.db: database or disk is full")
        return {"pid": 7}

    control = channels.Control(str(home / "channels.sock"), perform)
    real, failures = control._socket, [OSError("Too many open files"), RuntimeError("no thread")]

    class Full:
        """A socket that fails as one does on a machine that has nothing left."""

        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return real.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    control._socket = Full()
    thread = channels.spawn(control.run)
    assert channels.ask_gateway(str(home), {"do": "status"}) == {
        "error": "The gateway cannot do that: channels.db: database or disk is full"}
    assert channels.ask_gateway(str(home), {"do": "end"}) == {"pid": 7} and not failures
    control.end()
    thread.join(10)
    assert not thread.is_alive()


def test_a_platform_that_cannot_be_reached_is_a_warning(gateway: Gateway) -> None:
    done = gateway.run("add", "--channel", "telegram", "--token", "1:some-token", "--apiRoot",
                       "http://127.0.0.1:1")
    assert done.code == 0 and "could not be asked" in done.stdout
    assert (gateway.home / "channels.json").exists()


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (("start",), 2, "No channel is configured"),
    (("add", "--channel", "telegram"), 2, "botToken missing. Talk to @BotFather"),
    (("add", "--channel", "telegramm"), 1, 'no channel "telegramm". Known are: telegram'),
    (("add", "--channel", "telegram", "--botToken", "x", "--dmPolicy", "opn"), 2, "dmPolicy"),
    (("remove", "--channel", "telegram"), 1, "no such account"),
    (("login", "--channel", "telegram"), 2, "Telegram has no login. Talk to @BotFather"),
    (("pairing", "approve", "ABCDEFGH"), 1, "Nobody is waiting"),
    (("outbox", "retry", "3"), 1, "no unsent part 3"),
    (("start", "--wrong"), 2, "unknown arguments: --wrong"),
    (("nonsense",), 2, "invalid choice"),
    (("plugins", "install", "left-pad"), 2, "openclaw plugins install left-pad"),
    (("plugins", "install", "https://127.0.0.1:1/echo.py"), 2, "download a URL first"),
    (("plugins", "install", "/nowhere/echo.py"), 1, "/nowhere/echo.py: No such file"),
    (("plugins", "remove", "x"), 1, "no plugin x."),
])
def test_what_cannot_be_done_says_what_to_do(
    gateway: Gateway, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = gateway.run(*arguments)
    assert done.code == code and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "channel"), [
    ("grammy", "telegram"), ("@tencent-weixin/openclaw-weixin", "openclaw-weixin"),
    ("@dingtalk-real-ai/dingtalk-connector", "dingtalk-connector"), ("@openclaw/qqbot", "qqbot"),
    ("@tencent-connect/openclaw-qqbot", "qqbot")])
def test_packages_of_the_original_gateway_are_built_in(
    gateway: Gateway, name: str, channel: str
) -> None:
    done = gateway.run("channels", "plugins", "install", name)
    assert (done.code, done.stdout) == (
        0, f"Built in: {channel}. Nothing has to be installed.\n")
    assert not (gateway.home / "channels").exists()


def test_list_remove_version_and_outbox(gateway: Gateway) -> None:
    add(gateway)
    assert gateway.run("channels", "list").stdout == "telegram\n"
    assert json.loads(gateway.run("list", "--json").stdout) == ["telegram"]
    assert gateway.run("outbox").stdout == "Everything has been sent.\n"
    assert gateway.run("version").stdout.startswith("ocp_channels ")
    assert gateway.run("remove", "--channel", "telegram").code == 2
    assert gateway.run("remove", "--channel", "telegram", "--yes", "--purge").code == 0
    assert json.loads((gateway.home / "channels.json").read_text())["channels"] == {}


def test_a_purge_takes_nothing_of_an_account_with_nearly_the_same_name(tmp_path: Path) -> None:
    environ = {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}
    accounts = {name: {"botToken": f"1:{name}"} for name in ("a_b", "axb", "A_B")}
    (tmp_path / "channels.json").write_text(json.dumps({
        "channels": {"telegram": {"accounts": accounts}}}))
    store = channels.Store(str(tmp_path / "channels.db"))
    for name in accounts:
        store.put_state(f"telegram:{name}", {"offset": 1})
        store.remember(f"telegram:{name}:5", "user", "hi")
    words = ["remove", "--channel", "telegram", "--account", "a_b", "--yes", "--purge"]
    assert channels.main(["--config", str(tmp_path / "channels.json"), "channels", *words],
                         environ) == 0
    assert {name: bool(store.state(f"telegram:{name}")) for name in accounts} == {
        "a_b": False, "axb": True, "A_B": True}
    assert [len(store.history(f"telegram:{name}:5")) for name in accounts] == [0, 1, 1]
    store.close()


@pytest.mark.parametrize("content", [{"channels": []}, {"channels": {"telegram": "x"}}])
@pytest.mark.parametrize("words", [
    ["add", "--botToken", "1:a", "--no-probe"], ["remove", "--yes"], ["login"]])
def test_a_file_of_another_form_is_named_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Json, words: list[str]
) -> None:
    path = tmp_path / "channels.json"
    path.write_text(json.dumps(content))
    environ = {"OCP_HOME": str(tmp_path), "HOME": str(tmp_path)}
    assert channels.main([words[0], "--channel", "telegram", *words[1:]], environ) == 2
    assert "use an object" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


def test_a_refused_token_is_shown_and_does_not_end_the_gateway(gateway: Gateway) -> None:
    gateway.settings["channels"]["telegram"]["botToken"] = "1:wrong-token"
    gateway.start()
    one = eventually(lambda: [each for each in gateway.status()["channels"]
                              if each["status"] == "failed"])[0]
    assert one["error"] == "the token is refused: get a new one from @BotFather"


@pytest.mark.slow
def test_somebody_else_who_polls_the_bot_is_reported(gateway: Gateway) -> None:
    gateway.telegram.fail("getUpdates", 409, "Conflict: terminated by other getUpdates request")
    gateway.start()
    eventually(lambda: "another program polls" in str(gateway.status()["channels"]))
    assert gateway.telegram.called("deleteWebhook")
    gateway.telegram.say("hello")
    eventually(lambda: gateway.telegram.screen(1000) == ["You said: hello"])


def test_the_self_test_passes_and_fails_visibly(gateway: Gateway) -> None:
    good = gateway.run("test")
    assert good.code == 0 and good.stdout.count("ok ") == 3
    gateway.agent.enqueue(refused(401, "invalid_api_key"))
    bad = gateway.run("test", "--agent", gateway.agent.url)
    assert bad.code == 1 and "FAILED  the agent's answer arrives" in bad.stdout


def test_a_channel_in_a_file_of_the_owners_talks_until_the_file_changes(
    gateway: Gateway, tmp_path: Path
) -> None:
    source, answer = tmp_path / "echo.py", tmp_path / "answer"
    source.write_text(PLUGIN)
    assert gateway.run("plugins", "install", str(source)).code == 2
    done = gateway.run("plugins", "install", str(source), "--yes")
    assert hashlib.sha256(PLUGIN.encode()).hexdigest() in done.stdout
    gateway.settings["channels"] = {"echo": {"file": str(answer), "allowFrom": ["s"]}}
    gateway.start()
    eventually(lambda: answer.exists() and answer.read_text() == "You said: hello")
    gateway.kill()
    with open(gateway.home / "channels" / "echo.py", "a") as file:
        file.write("# changed\n")
    assert "has changed since it was installed" in gateway.run("plugins", "list").stdout
    assert gateway.run("start").code == 2
    (gateway.home / "channels" / "unknown.py").write_text(PLUGIN.replace("echo", "unknown"))
    gateway.settings["channels"] = {"telegram": {"botToken": gateway.telegram.token,
                                                 "apiRoot": gateway.telegram.url}}
    answer.unlink()
    gateway.start()
    status = gateway.run("status").stdout
    assert "plugin echo.py is not loaded: it has changed since it was installed" in status
    assert "plugin unknown.py is not loaded: it has changed since it was installed" in status
    assert not answer.exists()
    gateway.kill()
    assert gateway.run("plugins", "remove", "echo").code == 0


def test_the_file_of_the_original_gateway_is_used_in_place(gateway: Gateway) -> None:
    path = gateway.home / ".openclaw-channel-gateway" / "ocg.json"
    path.parent.mkdir()
    gateway.settings["_mine"] = "kept"
    path.write_text(json.dumps(gateway.settings))
    path.chmod(0o600)
    assert gateway.run("list").stdout == "telegram\n"
    assert "Saved telegram:default" in add(gateway, "--allowFrom", "1000")
    assert json.loads(path.read_text())["_mine"] == "kept"
    assert gateway.run("start", "-d", "--log-dir", str(gateway.home)).code == 0
    assert f"settings {path}, agent {gateway.agent.url}" in gateway.log
    gateway.telegram.say("hello")
    eventually(lambda: gateway.telegram.screen(1000) == ["You said: hello"])
    assert not (gateway.home / "channels.json").exists()


#: In the form of the original gateway's example: comments at every level, and no credentials yet.
EXAMPLE = {
    "_comment": "Copy it to ~/.openclaw-channel-gateway/ocg.json",
    "agentUrl": "http://127.0.0.1:11434/v1/chat/completions", "_agentUrl": "any agent",
    "channels": {
        "_comment": "one object for each channel",
        "telegram": {"_help": "@BotFather", "enabled": True, "botToken": "YOUR_BOT_TOKEN_HERE"},
        "openclaw-weixin": {"_help": "channels login", "enabled": True}},
}


def test_the_example_of_the_original_gateway_says_what_each_channel_lacks(
    gateway: Gateway,
) -> None:
    path = gateway.home / "channels.json"
    path.write_text(json.dumps(EXAMPLE))
    path.chmod(0o600)
    assert gateway.run("list").stdout == "telegram\nopenclaw-weixin\n"
    gateway.settings = EXAMPLE
    gateway.start()
    status = gateway.status()
    assert (status["configured"], status["running"]) == (2, 0)
    told = eventually(lambda: "login needed  not logged in" in (
        text := gateway.run("status").stdout) and text)
    assert "telegram  not configured  botToken missing" in told
    assert "run ocp channels login --channel openclaw-weixin" in told
    del EXAMPLE["channels"]["openclaw-weixin"]  # type: ignore[attr-defined]
    gateway.kill()
    gateway.write()
    done = gateway.run("start")
    assert done.code == 2 and "telegram:default: not configured (botToken)" in done.stderr


def test_a_start_tells_every_fault_of_the_settings_at_once(gateway: Gateway) -> None:
    gateway.settings = {
        "agentUrl": "ftp://x", "maxTurns": "many", "proxy": "socks5://x", "verbose": [],
        "channels": {
            "telegram": {"botToken": "a", "dmPolicy": "opn", "apiRoot": "http://example.com",
                         "accounts": {"b": {"botToken": "a"}, "c": {"dmPolicy": "open"},
                                      "d": {"dmPolicy": "allowlist"}, "e": {"dmPolcy": "open"}}},
            "discord": {"accounts": {"a b": {}}}, "nothing": {}, "qq": 7}}
    gateway.write()
    done = gateway.run("start")
    assert done.code == 2 and not done.stdout
    for place in ("agentUrl", "maxTurns", "proxy", "verbose", "channels.telegram.dmPolicy",
                  "channels.telegram.apiRoot", "telegram:b: telegram:default has the same botToken",
                  "channels.telegram.accounts.c.dmPolicy", "channels.telegram.accounts.d.allowFrom",
                  "channels.telegram.accounts.e.dmPolcy", "channels.discord.accounts.a b",
                  "channels.nothing", "channels.qq"):
        assert f"{place}" in done.stderr, done.stderr
    (gateway.home / "channels.json").write_text('{"channels": {\n"telegram" 7}}')
    done = gateway.run("start")
    assert done.code == 2 and "not JSON at line 2, column" in done.stderr


def test_the_key_of_one_agent_is_never_sent_to_another(gateway: Gateway) -> None:
    own = gateway.settings["channels"]["telegram"]
    with FakeAgent() as other, FakeDiscord() as discord:
        gateway.settings["apiKey"] = "key-of-the-first"
        gateway.settings["channels"]["discord"] = {
            "token": discord.token, "apiRoot": discord.url, "allowFrom": own["allowFrom"],
            "agentUrl": other.url}
        gateway.start()
        eventually(lambda: gateway.status()["running"] == 2)
        for count, text in enumerate(("/model", "hello"), 1):
            gateway.telegram.say(text)
            discord.say(text)
            eventually(functools.partial(all_have, count, gateway.agent, other))
        assert [each["authorization"] for each in gateway.agent.headers] == [
            "Bearer key-of-the-first"] * 2
        assert not any("authorization" in each for each in other.headers)
        assert "key-of-the-first" not in str([other.headers, other.requests])
        assert "channels.discord.agentUrl: no key is sent there" in gateway.log


def test_everything_on_disk_is_for_the_owner_alone(gateway: Gateway) -> None:
    gateway.start()
    for name in ("channels.db", "channels.sock", "channels.log", "channels.json"):
        assert os.stat(gateway.home / name).st_mode & 0o077 == 0, name


def test_flags_become_the_values_that_the_settings_have(gateway: Gateway) -> None:
    add(gateway, "--allowFrom", "1,2", "--requireMention=false", "--groups", "-100,-200",
        "--perSenderHour", "5")
    saved = json.loads((gateway.home / "channels.json").read_text())["channels"]["telegram"]
    del saved["botToken"], saved["apiRoot"]
    assert saved == {"enabled": True, "allowFrom": ["1", "2"], "requireMention": False,
                     "groups": ["-100", "-200"], "perSenderHour": "5"}
