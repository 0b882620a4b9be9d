"""docs/channels.md agrees with ocp_channels.py. OCP_UPDATE_DOCS=1 writes its table anew."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from project import REPO, load_script

channels = load_script("ocp_channels")
PAGE = REPO / "docs" / "channels.md"


def settings_table() -> str:
    """The settings as the page shows them."""
    where = {"top": "top level", "any": "anywhere", "channel": "channel, account"}
    lines = ["| setting | default | where | |", "| --- | --- | --- | --- |"]
    for each in channels.SETTINGS:
        default = str(each.default).lower() if isinstance(each.default, bool) else (
            str(each.default or ""))
        about = each.about + (f" (`{each.variable}`)" if each.variable else "")
        lines.append(f"| `{each.key}` | {f'`{default}`' if default else ''} | "
                     f"{where[each.level]} | {about} |")
    return "\n".join(lines)


def test_the_page_has_every_setting() -> None:
    text = PAGE.read_text()
    wanted = f"<!-- settings -->\n{settings_table()}\n<!-- end settings -->"
    if os.environ.get("OCP_UPDATE_DOCS"):
        PAGE.write_text(re.sub(r"(?s)<!-- settings -->.*<!-- end settings -->",
                               lambda _: wanted, text))
    assert wanted in PAGE.read_text()


def blocks(language: str) -> list[str]:
    """The pieces of the page in this language."""
    return re.findall(rf"(?s)```{language}\n(.*?)```", PAGE.read_text())


def test_each_file_of_settings_on_the_page_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work.token").write_text("2:two\n")
    found = [channels.parse_settings(json.loads(each), "", {"TELEGRAM_BOT_TOKEN": "1:one"},
                                     channels.ROWS) for each in blocks("json")]
    assert len(found) == 2 and not any(each.warnings for each in found)
    assert found[0].top["apiKey"] == "THE KEY"
    assert [(each.name, each.settings["botToken"], each.settings["model"])
            for each in found[1].accounts] == [
        ("default", "1:one", "sonnet"), ("work", "2:two", "opus")]


def test_the_settings_for_groups_on_the_page_let_their_person_in() -> None:
    """Each platform's section says what to write beside its credentials."""
    sections = dict(re.findall(r"(?ms)^## (Telegram|Discord|QQ|DingTalk)\n(.*?)(?=^## )",
                               PAGE.read_text()))
    rows = {row.label: row for row in channels.ROWS}
    assert len(sections) == 4
    for label, text in sections.items():
        bare = re.sub(r"\s+", " ", text)
        places, people = (re.search(pattern, bare) for pattern in (
            r'`("(?:groups|guilds)": \{.*?\})`', r'`("groupAllowFrom": \[.*?\])`'))
        assert places and people, label
        values = {**dict.fromkeys(rows[label].credentials, "x"),
                  **json.loads(f"{{{places[1]}, {people[1]}}}")}
        one = channels.parse_settings({"channels": {rows[label].id: values}}, "", {},
                                      channels.ROWS).accounts[0]
        (group, inner), = (one.settings.get("guilds") or one.settings["groups"]).items()
        place = next(iter(inner.get("channels", {group: {}})))
        asked = channels.Message("1", place, "group", one.settings["groupAllowFrom"][0], "", "hi",
                                 True, "", (), 0.0, {}, group, place)
        assert channels.judge_group(one, asked).reason == "", label


def test_the_plugin_on_the_page_is_a_channel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = blocks("python")
    plugins = channels.Plugins(str(tmp_path))
    plugins.put("echo.py", source.encode())
    (row,), refused = plugins.load()
    assert not refused and row.id == "echo"
    part = channels.Part("hello", True, "nonce")
    assert row.make(channels.Tools({}, {}), None).send({}, part)
    assert capsys.readouterr().out == "hello\n"


def test_the_page_has_every_command_and_channel() -> None:
    text = PAGE.read_text()
    missing = [command.words for command in channels.COMMANDS
               if command.words not in (("version",), ("outbox", "list"))
               and f"`{' '.join(command.words)}" not in text]
    assert not missing
    assert not [row.id for row in channels.ROWS if f"| `{row.id}` |" not in text]
