"""docs/channels.md agrees with ocp_channels.py. OCP_UPDATE_DOCS=1 writes its table anew."""

from __future__ import annotations

import os
import re

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


def test_the_page_has_every_command_and_channel() -> None:
    text = PAGE.read_text()
    missing = [command.words for command in channels.COMMANDS
               if command.words not in (("version",), ("outbox", "list"))
               and f"`{' '.join(command.words)}" not in text]
    assert not missing
    assert not [row.id for row in channels.ROWS if f"| `{row.id}` |" not in text]
