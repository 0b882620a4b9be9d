"""What ocp_connect.py does to files: every state in which it may find one, for every tool."""
from __future__ import annotations

import json
import os
import plistlib
import random
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from connect_home import KEY, OTHER, SERVER, Home
from project import load_script

connect = load_script("ocp_connect")
Json = Any



class Case(NamedTuple):
    """A tool's file as a user may have it, and how one writes a comment there."""
    path: str
    text: str
    comment: str


CASES = {
    "shell": Case(".bashrc", "# mine\nalias ll='ls -l'\nexport OPENAI_API_KEY=old\n", "# later"),
    "openclaw": Case(".openclaw/openclaw.json", """{
  // my gateway
  gateway: { mode: 'local', port: 18789, },
  models: { providers: { other: { baseUrl: "http://o/v1", models: [] } } },
  agents: { defaults: { /* here */ workspace: "~/w" } }
}
""", "// later"),
    "opencode": Case(".config/opencode/opencode.json", """{
  // which looks best
  "theme": "nord",
  "provider": {
    "local": { "npm": "x" }, // keep
  },
  "keybinds": {}
}
""", "// later"),
    "codex": Case(".codex/config.toml", """# my settings
approval_policy = "on-request"   # careful
notify = [
  "a", # [b]
]

# a table
[mcp_servers.docs]
command = "docs"
text = \"\"\"
[not.a.table]
model = "no"
\"\"\"
""", "# later"),
    "continue": Case(".continue/config.yaml", """name: Mine
version: 1.0.0
schema: v1
# models I like
models:
  - name: Local
    provider: ollama
    model: llama3 # small

# what to read
context:
  - provider: file
""", "# later"),
    "aider": Case(".aider.conf.yml", """# my aider
dark-mode: true

read:
  - CONVENTIONS.md  # always
""", "# later"),
    "cline": Case(".cline/data/settings/providers.json", """{
    "version": 1,
    "modes": {"plan": "x"},
    "providers": {"cline": {"settings": {"provider": "cline"}}}
}
""", "// later"),
    "llm": Case(".config/io.datasette.llm/extra-openai-models.yaml", """# mine
- model_id: other
  model_name: other
""", "# later"),
    "zed": Case(".config/zed/settings.json", """// Zed settings
{
\t"vim_mode": true, // yes
\t"language_models": {
\t\t"ollama": {"api_url": "http://localhost:11434"},
\t},
}
""", "// later"),
    "claude-code": Case(".claude/settings.json", """{
  "permissions": {"allow": ["Bash(ls:*)"]},
  "env": {"FOO": "bar"}
}
""", "// later"),
}
each_tool = pytest.mark.parametrize("tool", sorted(CASES))




@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def lines_stay(before: str, after: str) -> bool:
    """Whether all lines of a text are still there in their order. Before the end of one that
    closes an object, or is its last, something may have been added."""
    rest = iter(line.strip() for line in after.splitlines())
    starts = [line.strip().rstrip("}, ") for line in before.splitlines() if line.strip()]
    return all(any(other.startswith(start) for other in rest) for start in starts)


# ---------------------------------------------------------------------------
# Every state of every tool's file
# ---------------------------------------------------------------------------

@each_tool
def test_an_absent_file_is_made_and_undo_leaves_an_empty_home(home: Home, tool: str) -> None:
    home.connect(tool)
    assert (home.folder / CASES[tool].path).exists()

    home.undo()

    assert list(home.folder.iterdir()) == []


@each_tool
def test_an_empty_file_is_filled_and_comes_back_empty(home: Home, tool: str) -> None:
    path = home.put(CASES[tool].path, "")
    home.connect(tool)
    assert path.stat().st_size

    home.undo()

    assert home.files() == {CASES[tool].path: b""}


@each_tool
@pytest.mark.parametrize("shape", ["as it is", "CRLF", "no last newline", "BOM"])
def test_a_users_file_keeps_all_its_lines_and_comes_back_byte_for_byte(
    home: Home, tool: str, shape: str
) -> None:
    text = CASES[tool].text
    if shape == "CRLF":
        text = text.replace("\n", "\r\n")
    elif shape == "no last newline":
        text = text.rstrip("\n")
    elif shape == "BOM":
        text = "\ufeff" + text
    path = home.put(CASES[tool].path, text)

    plan = home.connect(tool)

    after = path.read_bytes().decode()
    assert not plan.manual and after != text and lines_stay(text, after)
    if shape == "CRLF" and tool != "shell":
        assert after.count("\n") == after.count("\r\n")
    home.undo()
    assert home.files() == {CASES[tool].path: text.encode()}


@each_tool
@pytest.mark.parametrize("start", ["absent", "full"])
def test_a_second_run_changes_nothing(home: Home, tool: str, start: str) -> None:
    if start == "full":
        home.put(CASES[tool].path, CASES[tool].text)
    home.connect(tool)
    before = home.files()

    plan = home.connect(tool)

    assert not plan.edits and home.files() == before


@each_tool
def test_a_link_stays_a_link(home: Home, tool: str) -> None:
    case = CASES[tool]
    real = home.put("dotfiles/real", case.text)
    link = home.folder / case.path
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(real)

    home.connect(tool)

    assert link.is_symlink() and real.read_text() != case.text
    home.undo()
    assert link.is_symlink() and real.read_text() == case.text


@each_tool
def test_a_read_only_file_is_left_alone_and_the_change_is_printed(home: Home, tool: str) -> None:
    path = home.put(CASES[tool].path, CASES[tool].text)
    path.chmod(0o444)

    plan = home.connect(tool)

    (found,) = plan.manual
    assert path.read_text() == CASES[tool].text and "read-only" in found.reason and found.snippet
    shown = connect.show_plan(plan, home.machine, KEY, True)
    assert KEY not in shown and "by hand" in shown


@each_tool
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_a_file_keeps_its_mode(home: Home, tool: str, mode: int) -> None:
    path = home.put(CASES[tool].path, CASES[tool].text)
    path.chmod(mode)

    home.connect(tool)

    assert stat.S_IMODE(path.stat().st_mode) == mode


@each_tool
@pytest.mark.parametrize("where", ["top", "end"])
def test_what_was_edited_since_stays_when_ours_goes(home: Home, tool: str, where: str) -> None:
    case = CASES[tool]
    path = home.put(case.path, case.text)
    home.connect(tool)
    after = path.read_text()
    edited = f"{case.comment}\n{after}" if where == "top" else f"{after}{case.comment}\n"
    path.write_text(edited)

    again = home.connect(tool)
    assert path.read_text() == edited and not again.edits
    plan = home.undo()

    wanted = f"{case.comment}\n{case.text}" if where == "top" else f"{case.text}{case.comment}\n"
    assert path.read_text() == wanted
    assert any("you have changed it" in edit.why for edit in plan.edits)
    assert list(home.files()) == [case.path]


@each_tool
def test_another_server_takes_the_place_of_the_first_and_undo_goes_all_the_way(
    home: Home, tool: str
) -> None:
    case = CASES[tool]
    path = home.put(case.path, case.text)
    home.connect(tool)

    plan = home.connect(tool, server=OTHER)

    texts = [content.decode() for name, content in home.files().items()
             if not name.startswith(".config/ocp/co")]
    assert plan.edits and any(OTHER.url in text for text in texts)
    assert not any(SERVER.url in text for text in texts)
    home.undo()
    assert path.read_text() == case.text and list(home.files()) == [case.path]


@each_tool
def test_a_file_that_is_not_understood_is_left_alone(home: Home, tool: str) -> None:
    if tool == "shell":
        content = b"# >>> ocp >>>\nexport A=b\n"  # The end of a block is gone.
    else:
        content = b"{ this: [ is\n\t\tnot: - it\n"
    path = home.put(CASES[tool].path, content)

    plan = home.connect(tool)

    assert path.read_bytes() == content
    assert [each.path for each in plan.manual] == [str(path)]


@each_tool
def test_a_file_that_is_no_text_is_left_alone(home: Home, tool: str) -> None:
    path = home.put(CASES[tool].path, b"\xff\xfe\x00a")

    plan = home.connect(tool)

    assert path.read_bytes() == b"\xff\xfe\x00a" and len(plan.manual) == 1


@each_tool
def test_a_new_file_with_the_key_is_for_its_owner_only(home: Home, tool: str) -> None:
    home.connect(tool)

    for name, content in home.files().items():
        if KEY.encode() in content:
            assert stat.S_IMODE((home.folder / name).stat().st_mode) == 0o600, name


@each_tool
def test_a_file_of_ours_that_gets_a_key_later_is_for_its_owner_only(
    home: Home, tool: str
) -> None:
    home.connect(tool, server=SERVER._replace(key=""))
    home.connect(tool)

    for name, content in home.files().items():
        if KEY.encode() in content:
            assert stat.S_IMODE((home.folder / name).stat().st_mode) == 0o600, name


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_key_of_all_its_characters_is_neither_shown_nor_left_readable(
    tmp_path: Path, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "ke~y+/=._~MIDDLE-of-it-5678"
    server, home = SERVER._replace(key=key), Home(tmp_path / "home", platform)
    home.put("bin/launchctl", "#!/bin/sh\n").chmod(0o755)
    (home.folder / ".config/fish").mkdir(parents=True)
    (home.folder / connect.nushell_folder(home.machine)).mkdir(parents=True)
    home.put(".cshrc", "")
    monkeypatch.setattr("connect_home.KEY", key)

    plan = home.connect(*CASES, server=server)

    shown = connect.show_plan(plan, home.machine, key, True)
    assert "MIDDLE" not in shown and "MIDDLE" not in json.dumps(
        connect.plan_json(plan, home.machine, key))
    open_to_all = [name for name in home.files() if (home.folder / name).stat().st_mode & 0o077]
    for name in open_to_all:
        assert "MIDDLE" not in (home.folder / name).read_text(), name


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@each_tool
def test_a_file_keeps_its_owner(home: Home, tool: str) -> None:
    path = home.put(CASES[tool].path, CASES[tool].text)
    os.chown(path, 12345, 23456)

    home.connect(tool)
    changed = path.stat()
    home.undo()

    assert [(at.st_uid, at.st_gid) for at in (changed, path.stat())] == [(12345, 23456)] * 2


@each_tool
def test_no_plan_shows_the_key(home: Home, tool: str) -> None:
    home.put(CASES[tool].path, CASES[tool].text)

    plan = home.plan(tool)

    shown = connect.show_plan(plan, home.machine, KEY, True)
    assert KEY not in shown + connect.show_hints(plan.hints)
    assert KEY not in json.dumps(connect.plan_json(plan, home.machine, KEY))
    assert plan.edits and not home.files().keys() - {CASES[tool].path}


# ---------------------------------------------------------------------------
# All tools at once, and trouble
# ---------------------------------------------------------------------------

def test_undo_of_one_tool_leaves_the_others(home: Home) -> None:
    home.connect("aider", "codex")

    home.undo("aider")

    assert not (home.folder / ".aider.conf.yml").exists()
    assert (home.folder / ".codex/config.toml").exists()
    home.undo()
    assert home.files() == {}


@pytest.mark.parametrize("lost", range(24))
def test_whichever_write_fails_undo_gives_everything_back(
    home: Home, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    tools = ("shell", "aider", "codex", "opencode", "llm")
    for tool in tools:
        home.put(CASES[tool].path, CASES[tool].text)
    before, whole, left = home.files(), connect.write_whole, [lost]

    def failing(path: str, content: bytes, mode: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        whole(path, content, mode)

    record, plan = connect.load_record(home.machine.state_folder), home.plan(*tools)
    writer = connect.Writer(home.machine, record, KEY)
    with monkeypatch.context() as patched:
        patched.setattr(connect, "write_whole", failing)
        try:
            writer.connect(plan, "url")
        except OSError:
            pass  # The record itself could not be written.
    assert bool(writer.failures) == (lost < 23), writer.failures

    home.undo()

    after = {name: content for name, content in home.files().items()
             if not name.startswith(".config/ocp/copies/")}
    assert after == before


def test_a_file_that_changes_between_plan_and_write_is_not_touched(home: Home) -> None:
    path = home.put(".aider.conf.yml", "dark-mode: true\n")
    record = connect.load_record(home.machine.state_folder)
    plan = home.plan("aider")
    path.write_text("dark-mode: false\n")

    writer = connect.Writer(home.machine, record, KEY)
    writer.connect(plan, "url")

    assert path.read_text() == "dark-mode: false\n" and len(writer.failures) == 1


#: The programs of a Home have no PATH but its own.
GREP = shutil.which("grep")


def refusing(home: Home, name: str, script: str) -> Any:
    """What a writer says when a program of the tool answers like this script."""
    home.put(f"bin/{name}", f"#!/bin/sh\n{script}\n").chmod(0o755)
    record, plan = connect.load_record(home.machine.state_folder), home.plan(name)
    writer = connect.Writer(home.machine, record, KEY)
    writer.connect(plan, "url")
    return writer


def test_a_change_that_the_tool_does_not_accept_is_taken_back(home: Home) -> None:
    path = home.put(".codex/config.toml", "a = 1\n")

    script = f"{GREP} -q ocp {path} || exit 0; echo 'bad config' >&2; exit 1"
    writer = refusing(home, "codex", script)

    assert path.read_text() == "a = 1\n" and str(path) not in writer.written
    assert "Codex does not accept the change" in writer.failures[0]
    assert "bad config" in writer.failures[0]


def test_a_tool_that_failed_before_the_change_is_a_note_and_the_change_stays(home: Home) -> None:
    path = home.put(".codex/config.toml", "a = 1\n")

    writer = refusing(home, "codex", "echo 'plugin x is broken' >&2; exit 1")

    assert "model_providers.ocp" in path.read_text() and not writer.failures
    assert "failed before the change too" in writer.notes[0] and "plugin x" in writer.notes[0]
    home.undo()
    assert path.read_text() == "a = 1\n"


@pytest.mark.parametrize("present", [True, False])
def test_what_a_tool_writes_while_it_is_asked_is_taken_back_too(home: Home, present: bool) -> None:
    """OpenCode puts "$schema" into its file, also when it is only asked for its configuration."""
    path = home.folder / ".codex/config.toml"
    if present:
        home.put(".codex/config.toml", "a = 1\n")

    script = f"{GREP} -q ocp {path} && exit 1; echo b = 2 >> {path}"
    writer = refusing(home, "codex", script)

    assert "does not accept the change" in writer.failures[0]
    assert path.exists() == present and (not present or path.read_text() == "a = 1\n")


def test_a_tool_is_found_by_its_program_or_its_files(home: Home) -> None:
    def found(**environ: str) -> set[str]:
        machine = connect.dataclasses.replace(
            home.machine, environ={**home.machine.environ, **environ})
        return {tool.name for tool in connect.TOOLS if tool.is_here(machine)}

    assert found() == set()
    home.put("bin/codex", "").chmod(0o755)
    home.put(".vscode/extensions/saoudrizwan.claude-dev-3.1/package.json", "")
    home.put("xdg/opencode/opencode.json", "{}")
    assert found() == {"codex", "cline-vscode"}
    assert "opencode" in found(XDG_CONFIG_HOME=str(home.folder / "xdg"))


def test_a_second_run_that_the_tool_refuses_keeps_what_the_first_did(home: Home) -> None:
    path = home.put(".codex/config.toml", "a = 1\n")
    home.connect("codex")
    first = path.read_text()

    home.put("bin/codex", f"#!/bin/sh\n! {GREP} -q 192.0.2.8 {path}\n").chmod(0o755)
    record = connect.load_record(home.machine.state_folder)
    writer = connect.Writer(home.machine, record, KEY)
    writer.connect(home.plan("codex", server=OTHER), "url")

    assert writer.failures and path.read_text() == first
    home.undo()
    assert path.read_text() == "a = 1\n"


def test_two_files_with_the_same_content_have_a_copy_each(home: Home) -> None:
    one = home.put(".claude/settings.json", "{}")
    other = home.put(".config/zed/settings.json", "{}")
    home.connect("claude-code", "zed")

    home.undo("zed")
    home.undo()

    assert one.read_text() == other.read_text() == "{}"


def test_a_broken_record_stops_everything(home: Home) -> None:
    home.put(".config/ocp/connect.json", "{")

    with pytest.raises(connect.Problem, match="is damaged"):
        connect.load_record(home.machine.state_folder)


def test_a_record_that_cannot_be_read_is_not_called_damaged(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = home.put(".config/ocp/connect.json", "{}")

    def opened(path: str, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(connect, "open", opened, raising=False)

    with pytest.raises(connect.Problem, match="cannot be read .Permission denied., so earlier"):
        connect.load_record(home.machine.state_folder)
    assert record.read_text() == "{}"


def test_where_no_record_can_be_written_no_file_is_changed_and_all_is_shown(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.put(".aider.conf.yml", "dark-mode: true\n")
    state, access = home.folder / ".config", os.access
    state.mkdir(exist_ok=True)
    monkeypatch.setattr(connect.os, "access", lambda path, mode: (
        not str(path).startswith(str(state)) and access(path, mode)))
    before = home.files()

    plan = home.plan("aider")
    shown = connect.show_plan(plan, home.machine, KEY, False)

    assert not plan.edits and home.files() == before
    assert "~/.aider.conf.yml  (Aider) is not changed: it could not be undone, " in shown
    assert "connect.json lies in a folder that cannot be written to" in shown
    assert "the key is in" not in shown and "Add this by hand (with the whole key)" in shown


def test_what_stops_a_change_is_named_and_not_the_file_that_is_well(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.put(".aider.conf.yml", "dark-mode: true\n")
    before, write = home.files(), connect.write_whole

    def full(path: str, *more: Any) -> None:
        if path.endswith("connect.json"):
            raise OSError(28, "No space left on device", path)
        write(path, *more)

    monkeypatch.setattr(connect, "write_whole", full)
    writer = connect.Writer(home.machine, connect.load_record(home.machine.state_folder), KEY)
    writer.connect(home.plan("aider"), "url")

    assert ("~/.aider.conf.yml is not changed: ~/.config/ocp/connect.json: No space left on device"
            in writer.failures)
    # No copy is left of a file that was not changed.
    assert home.files() == before


def test_of_a_long_line_the_beginning_is_shown_unless_all_is_asked_for(home: Home) -> None:
    home.put(".openclaw/openclaw.json", "{a: 1}")
    plan = home.plan("openclaw")

    short, whole = (connect.show_plan(plan, home.machine, KEY, each) for each in (False, True))

    assert max(map(len, short.splitlines())) < 250 and "characters; --dry-run shows all" in short
    assert "characters; --dry-run" not in whole and max(map(len, whole.splitlines())) > 1000


def test_a_lost_copy_is_said_and_the_file_stays(home: Home) -> None:
    path = home.put(".aider.conf.yml", "dark-mode: true\n")
    home.connect("aider")
    after = path.read_text()
    for copy in (home.folder / ".config/ocp/copies").iterdir():
        copy.unlink()

    record = connect.load_record(home.machine.state_folder)
    plan = connect.plan_undo(record, ())

    assert [each.reason for each in plan.manual] and path.read_text() == after


# ---------------------------------------------------------------------------
# Whose choice the default is
# ---------------------------------------------------------------------------

DEFAULTS = {
    "codex": (".codex/config.toml", 'model = "gpt-5" # best\n', 'model = "gpt-5" # best'),
    "opencode": (".config/opencode/opencode.json", '{"model": "local/x"}\n', '"local/x"'),
    "aider": (".aider.conf.yml", "model: sonnet\n", "model: sonnet"),
    "zed": (".config/zed/settings.json",
            '{"agent": {"default_model": {"provider": "zed.dev", "model": "x"}}}\n', "zed.dev"),
    "llm": (".config/io.datasette.llm/default_model.txt", "gpt-5\n", "gpt-5"),
    "cline": (".cline/data/settings/providers.json", '{"lastUsedProvider": "cline"}\n',
              '"cline"'),
    "openclaw": (".openclaw/openclaw.json",
                 '{"agents": {"defaults": {"model": "anthropic/x"}}}\n', '"anthropic/x"'),
}


@pytest.mark.parametrize("tool", sorted(DEFAULTS))
def test_a_default_of_the_users_stays_unless_primary(home: Home, tool: str) -> None:
    name, text, mine = DEFAULTS[tool]
    path = home.put(name, text)

    home.connect(tool)
    assert mine in path.read_text()

    home.connect(tool, role=connect.Role.PRIMARY)
    assert mine not in path.read_text()
    home.connect(tool)
    assert mine not in path.read_text(), "a plain run keeps the choice that was made"
    home.undo()
    assert home.files() == {name: text.encode()}


@pytest.mark.parametrize("tool", sorted(DEFAULTS))
def test_backup_makes_no_default(home: Home, tool: str) -> None:
    home.connect(tool, role=connect.Role.BACKUP)

    text = "".join(content.decode() for name, content in home.files().items()
                   if not name.startswith(".config/ocp/"))
    words = ('model = "claude', '"model": "ocp/', "default_model", '"primary"',
             "lastUsedProvider")
    assert not [word for word in words if word in text]
    assert "default_model.txt" not in str(list(home.files()))


def test_backup_says_of_a_tool_without_a_choice_that_it_is_left_alone(home: Home) -> None:
    """Aider has one place for a provider, which is its default."""
    home.put(".aider.conf.yml", "dark-mode: true\n")

    plan = home.connect("aider", role=connect.Role.BACKUP)

    (kept,) = plan.kept
    assert kept[0] == "aider" and "--backup" in kept[2] and not plan.settled
    shown = connect.show_plan(plan, home.machine, KEY, False)
    assert "1 file left alone: Aider" in shown and "up to date" not in shown


def shell_lines(home: Home) -> list[str]:
    path = home.folder / ".config/ocp/env.sh"
    return path.read_text().splitlines() if path.exists() else []


def openai_lines(home: Home) -> list[str]:
    return [line for line in shell_lines(home) if line.startswith("export OPENAI_")]


def with_environ(home: Home, **environ: str) -> Home:
    home.machine = connect.dataclasses.replace(
        home.machine, environ={**home.machine.environ, **environ})
    return home


@pytest.mark.parametrize("start, environ, place", [
    ("export OPENAI_API_KEY=sk-mine\n", {}, "line 1 of ~/.bashrc"),
    ("", {"OPENAI_API_KEY": "sk-mine"}, "in your environment"),
    ("", {"OPENAI_BASE_URL": "https://api.openai.com/v1"}, "in your environment"),
])
def test_a_key_of_the_users_is_not_hidden_unless_that_was_asked_for(
    home: Home, start: str, environ: dict[str, str], place: str
) -> None:
    home.put(".bashrc", start)
    with_environ(home, **environ)

    plan = home.connect("shell", asked=())
    assert not openai_lines(home) and "export OCP_API_KEY" in "".join(shell_lines(home))
    shown = connect.show_plan(plan, home.machine, KEY, False)
    assert f"({place}) stays" in shown and "sk-mine" not in shown

    for asked, role in (((), connect.Role.PRIMARY), (("shell",), connect.Role.AUTO)):
        plan = home.connect("shell", asked=asked, role=role)
        assert len(openai_lines(home)) == 3
        home.undo()
        assert home.files() == {".bashrc": start.encode()}
    assert f"hides your {'OPENAI_BASE_URL' if 'OPENAI_BASE_URL' in environ else 'OPENAI_API_KEY'} "\
        f"({place})" in connect.show_plan(plan, home.machine, KEY, False)


def test_backup_points_no_program_of_openai_at_ocp(home: Home) -> None:
    home.put(".bashrc", "")

    plan = home.connect("shell", role=connect.Role.BACKUP)

    assert not openai_lines(home) and "export OCP_API_KEY" in "".join(shell_lines(home))
    assert "with --backup" in connect.show_plan(plan, home.machine, KEY, False)


def test_what_an_earlier_run_has_set_is_not_taken_for_the_users(home: Home) -> None:
    """A new shell has OCP's own variables, also those of another server."""
    home.connect("shell", asked=())
    with_environ(home, OPENAI_BASE_URL=SERVER.api, OPENAI_API_KEY=KEY)

    assert home.plan("shell", asked=()).is_empty
    home.connect("shell", asked=(), server=OTHER)

    assert any(OTHER.api in line for line in openai_lines(home))


# ---------------------------------------------------------------------------
# What OCP is called where providers have names
# ---------------------------------------------------------------------------

THEIRS = "http://192.0.2.99:1/v1"
OWN_NAME = {"zed": "OCP"}
#: A file with a provider of the user's own that has the name that OCP would take.
TAKEN = [
    ("opencode", CASES["opencode"].path, '{"provider": {"ocp": {"options": {"baseURL": "%s"}}}}\n'
     % THEIRS),
    ("opencode", CASES["opencode"].path, '{"provider": {"ocp": {/* none yet */}}}\n'),
    ("zed", CASES["zed"].path,
     '{"language_models": {"openai_compatible": {"OCP": {"api_url": "%s"}}}}\n' % THEIRS),
    ("codex", CASES["codex"].path, "[model_providers.ocp]\nname = 'mine'\n"),
    ("codex", CASES["codex"].path, '[model_providers.ocp]\nbase_url = "%s"\n' % SERVER.api),
    ("codex", CASES["codex"].path, "[model_providers]\nocp = {name = 'x'}\n"),
    ("codex", CASES["codex"].path, "model_providers.ocp.name = 'x'\n"),
    ("llm", ".config/io.datasette.llm/keys.json", '{"ocp": "mine"}\n'),
]


def written(home: Home) -> str:
    """All that the files of the tools hold."""
    return "".join(content.decode() for name, content in home.files().items()
                   if not name.startswith(".config/ocp/"))


@pytest.mark.parametrize("tool, path, text", TAKEN)
def test_a_provider_of_the_users_with_our_name_stays_and_we_have_another(
    home: Home, tool: str, path: str, text: str
) -> None:
    file, name = home.put(path, text), OWN_NAME.get(tool, "ocp")

    plan = home.connect(tool)

    assert not plan.manual and lines_stay(text, file.read_text())
    assert f"OCP is called {name}-2" in connect.show_plan(plan, home.machine, KEY, False)
    if tool == "codex":
        tables = connect.codex_providers(file.read_text())
        assert list(tables) == ["ocp", "ocp-2"] and 'model_provider = "ocp-2"' in written(home)
    else:
        assert f'"{name}-2"' in file.read_text() and (
            f"{name}-2/{SERVER.main.id}" in written(home) or '"provider": "OCP-2"' in written(home))
    assert not home.plan(tool).edits
    home.connect(tool, server=OTHER)
    assert f"{name}-3" not in written(home) and OTHER.url in written(home)
    home.undo()
    assert home.files() == {path: text.encode()}


@pytest.mark.parametrize("tool", ["opencode", "zed", "codex", "llm"])
def test_a_name_that_was_asked_for_is_kept_until_another_is(home: Home, tool: str) -> None:
    home.connect(tool, provider="plan")

    assert not home.connect(tool).edits and "plan" in written(home)
    home.connect(tool, provider="other")
    assert "plan" not in written(home) and "other" in written(home)
    home.undo()
    assert home.files() == {}


@pytest.mark.parametrize("tool, path, text", [each for each in TAKEN if THEIRS in each[2]])
def test_a_name_that_was_asked_for_and_is_the_users_is_refused(
    home: Home, tool: str, path: str, text: str
) -> None:
    home.put(path, text)

    with pytest.raises(connect.Problem) as raised:
        home.plan(tool, provider=OWN_NAME.get(tool, "ocp"))

    assert raised.value.code == 2 and f"for {THEIRS}: choose another name" in str(raised.value)


@pytest.mark.parametrize("tool", ["opencode", "zed", "codex", "llm"])
def test_what_ocp_wrote_is_ours_without_the_record_too(home: Home, tool: str) -> None:
    home.connect(tool)
    before = written(home)
    (home.folder / ".config/ocp/connect.json").unlink()

    home.connect(tool)

    assert written(home) == before


@pytest.mark.parametrize("text", [
    "", "model_context_window = 400000\n", 'model = "gpt-5"\n', 'model_provider = "mine"\n'])
def test_codex_learns_the_window_of_the_model_that_is_chosen(home: Home, text: str) -> None:
    path = home.put(CASES["codex"].path, text)

    plan = home.connect("codex")

    window = f"model_context_window = {SERVER.main.context_tokens}\n"
    assert (window in path.read_text()) is not bool(text)
    assert f"-c model_context_window={SERVER.main.context_tokens} " in " ".join(plan.hints)
    home.connect("codex", role=connect.Role.PRIMARY)
    assert window in path.read_text() and "400000" not in path.read_text()
    home.undo()
    assert path.read_text() == text


# ---------------------------------------------------------------------------
# Shells and sessions
# ---------------------------------------------------------------------------

def names_of(home: Home, **environ: str) -> list[str]:
    machine = connect.dataclasses.replace(home.machine, environ={"PATH": "", **environ})
    return [os.path.relpath(path, home.folder) for path in connect.shell_files(machine)]


def test_the_shell_files_are_those_of_the_shells_in_use(home: Home) -> None:
    assert names_of(home, SHELL="/bin/bash") == [".bashrc"]
    assert names_of(home, SHELL="/usr/bin/zsh") == [".zshrc"]
    assert names_of(home, SHELL="/bin/dash") == [".profile"]
    assert names_of(home, SHELL="/usr/bin/fish") == []
    assert names_of(home) == [".profile"]
    assert names_of(home, SHELL="/bin/zsh", ZDOTDIR=str(home.folder / "z")) == ["z/.zshrc"]
    home.put(".bashrc", "")
    assert names_of(home, SHELL="/usr/bin/zsh") == [".bashrc", ".zshrc"]


def csh_names_of(home: Home, shell: str) -> list[str]:
    machine = connect.dataclasses.replace(home.machine, environ={"PATH": "", "SHELL": shell})
    return [os.path.relpath(path, home.folder) for path in connect.csh_files(machine)]


def test_csh_and_tcsh_have_each_the_file_that_they_read(home: Home) -> None:
    assert csh_names_of(home, "/bin/bash") == []
    assert csh_names_of(home, "/bin/tcsh") == csh_names_of(home, "/bin/csh") == [".cshrc"]
    home.put(".tcshrc", "")
    assert csh_names_of(home, "/bin/bash") == [".tcshrc"]
    home.put(".cshrc", "")
    assert csh_names_of(home, "/bin/bash") == [".tcshrc", ".cshrc"]
    assert names_of(home, SHELL="/bin/tcsh") == [], "csh reads nothing of sh's"


def test_on_macos_the_login_file_of_bash_is_written_too(tmp_path: Path) -> None:
    home = Home(tmp_path / "mac", "darwin")
    assert names_of(Home(home.folder, "darwin"), SHELL="/bin/bash") == [
        ".bashrc", ".bash_profile", ".zshrc"]
    home.put(".profile", "")
    assert names_of(home, SHELL="/bin/bash")[1] == ".profile"


def test_a_start_file_does_not_hold_the_key(home: Home) -> None:
    home.connect("shell")

    assert KEY not in (home.folder / ".bashrc").read_text()
    assert KEY in (home.folder / ".config/ocp/env.sh").read_text()


@pytest.mark.parametrize("key", ["it's", "$HOME", 'a"b`c`', "\\n;#"])
def test_a_shell_reads_the_key_as_it_is(home: Home, key: str) -> None:
    home.connect("shell", server=SERVER._replace(key=key))

    command = f". {home.folder}/.bashrc; printf %s \"$OPENAI_API_KEY\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)

    assert done.stdout == key


class Started(NamedTuple):
    """A shell, a start file of it, and how it prints a variable."""
    shell: str
    file: str
    command: tuple[str, ...]


SHELLS = {
    "bash": Started("bash", ".bashrc", ("bash", "-ic", 'printf %s "$OPENAI_API_KEY"')),
    "zsh": Started("zsh", ".zshrc", ("zsh", "-ic", 'printf %s "$OPENAI_API_KEY"')),
    "sh": Started("sh", ".profile", ("sh", "-lic", 'printf %s "$OPENAI_API_KEY"')),
    "tcsh": Started("tcsh", ".tcshrc", ("tcsh", "-c", "printenv OPENAI_API_KEY")),
    "cshrc": Started("tcsh", ".cshrc", ("tcsh", "-c", "printenv OPENAI_API_KEY")),
}
#: What may stand in a start file of sh's family, and in one of csh's.
START_FILES: dict[str, tuple[str, str]] = {
    "plain": ("alias ll='ls -l'\n", "alias ll 'ls -l'\n"),
    "CRLF": ("if [ 1 ]; then\r\n  :\r\nfi\r\n", "if (1) then\r\n  echo\r\nendif\r\n"),
    "CRLF after a first line without": (
        "# mine\nif [ 1 ]; then\r\n  :\r\nfi\r\n", "# mine\nif (1) then\r\nendif\r\n"),
    "return at the end": ("export A=b\nreturn 0\n", "setenv A b\nexit\n"),
    "exec of another": ("exec env A=b \"$0\" -c : \n", "exec true\n"),
    "only for interactive shells": ("case $- in *never*) ;; *) return;; esac\n",
                                    "if (! $?nothing) exit\n"),
    "a line that goes on": ("alias ll='ls' \\\n", "alias ll ls \\\n"),
    "a setting of one's own": ("export OPENAI_API_KEY=old\n", "setenv OPENAI_API_KEY old\n"),
    "a setting, and a return in a function": (
        "f() {\n  return 1\n}\nOPENAI_API_KEY=old\n", "set -f OPENAI_API_KEY = old\n"),
}


def in_shell(home: Home, name: str) -> subprocess.CompletedProcess[str]:
    """What a new shell says that OPENAI_API_KEY is."""
    return subprocess.run(
        SHELLS[name].command, env={**os.environ, "HOME": str(home.folder), "TERM": "dumb"},
        cwd=home.folder, capture_output=True, text=True, check=False, timeout=120,
        stdin=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.parametrize("content", sorted(START_FILES))
@pytest.mark.parametrize("name", sorted(SHELLS))
def test_a_new_shell_has_the_variables_whatever_its_start_file_is(
    home: Home, name: str, content: str
) -> None:
    shell = SHELLS[name]
    if not shutil.which(shell.shell):
        pytest.skip(f"no {shell.shell}: apt-get install {shell.shell}")
    text = START_FILES[content]["csh" in name]
    path = home.put(shell.file, text)
    environ = {**home.machine.environ, "SHELL": shell.shell}
    home.machine = connect.dataclasses.replace(home.machine, environ=environ)

    plan = home.connect("shell")

    if content == "exec of another":
        # Nothing is left that could print; the one that takes over has what it needs.
        assert path.read_text().startswith("# >>> ocp >>>")
    else:
        assert in_shell(home, name).stdout.strip() == KEY
    assert not plan.manual and not home.plan("shell").edits
    home.undo()
    assert home.files() == {shell.file: text.encode()}


def start_file(home: Home, text: str) -> tuple[str, tuple[str, ...]]:
    """A .bashrc after a run, and what the plan says about it."""
    path = home.put(".bashrc", text)
    plan = home.connect("shell")
    (edit,) = (each for each in plan.edits if each.path == str(path))
    assert all(note in connect.show_plan(plan, home.machine, KEY, False) for note in edit.notes)
    return path.read_bytes().decode(), edit.notes


def test_a_start_file_with_crlf_has_our_lines_first_and_with_lf(home: Home) -> None:
    text = "# mine\r\nalias a=b\r\n"

    after, notes = start_file(home, text)

    assert after.endswith(f"\n{text}") and "\r" not in after[:-len(text)]
    (note,) = notes
    assert "CR LF" in note and f"perl -pi -e 's/\\r$//' {home.folder}/.bashrc" in note


def test_lines_that_an_earlier_run_wrote_with_crlf_are_mended(home: Home) -> None:
    home.connect("shell")
    path = home.folder / ".bashrc"
    block = path.read_text()
    broken = "alias a=b\r\n" + block.replace("\n", "\r\n")
    path.write_bytes(broken.encode())

    home.connect("shell")

    assert path.read_bytes().decode() == f"{block}alias a=b\r\n"


def test_lines_that_are_not_read_any_more_are_moved(home: Home) -> None:
    path = home.put(".bashrc", "alias a=b\n")
    home.connect("shell")
    after = path.read_text()
    assert after.startswith("alias")
    path.write_text(f"return\n{after}")

    home.connect("shell")

    assert path.read_text() == after[len("alias a=b\n"):] + "return\nalias a=b\n"


@pytest.mark.parametrize("text, number", [
    ("export OPENAI_API_KEY=mine\nreturn\n", 4), ("# x\r\nOPENAI_BASE_URL=http://x\r\n", 5)])
def test_a_setting_that_wins_over_ours_is_named(home: Home, text: str, number: int) -> None:
    after, notes = start_file(home, text)

    line = after.splitlines()[number - 1]
    variable = line.replace("export ", "").partition("=")[0]
    assert notes[-1] == (
        f"line {number} sets {variable} after OCP's lines and overrides them: remove it")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make, said", [
    (fifo, "is not a regular file"), (device, "is not a regular file"),
    (Path.mkdir, "cannot be read (Is a directory)"),
    (circle, "cannot be read (Too many levels of symbolic links)")])
@each_tool
def test_what_is_no_file_is_left_alone_and_said(
    home: Home, tool: str, make: Any, said: str
) -> None:
    path = home.folder / CASES[tool].path
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)

    plan = home.connect(tool)

    (found,) = plan.manual
    assert found.path == str(path) and found.reason == said and found.snippet


@pytest.mark.parametrize("zshenv", ["ZDOTDIR=~/z\n", "echo noise\nZDOTDIR=$HOME/z\n"])
@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh: apt-get install zsh")
def test_zsh_says_itself_where_its_start_file_is(home: Home, zshenv: str) -> None:
    home.put(".zshenv", zshenv)
    home.put("z/.zshrc", "alias a=b\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(home.folder), "SHELL": "/bin/zsh"}
    home.machine = connect.dataclasses.replace(home.machine, environ=environ)

    home.connect("shell")

    assert not (home.folder / ".zshrc").exists()
    assert in_shell(home, "zsh").stdout.split()[-1] == KEY


@pytest.mark.parametrize("script", ["exit 1", "echo", "echo =relative", "sleep 600 & wait"])
def test_a_zsh_that_does_not_say_it_is_not_waited_for(
    home: Home, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "ZSH_TIMEOUT_S", 0.5)
    home.put(".zshenv", "")
    home.put("bin/zsh", f"#!/bin/sh\n{script}\n").chmod(0o755)
    environ = {"PATH": f"{home.folder}/bin:/usr/bin:/bin", "SHELL": "/bin/zsh"}
    home.machine = connect.dataclasses.replace(home.machine, environ=environ)

    assert connect.shell_files(home.machine) == [str(home.folder / ".zshrc")]


def test_a_shell_that_reads_none_of_the_files_is_named(home: Home) -> None:
    environ = {**home.machine.environ, "SHELL": "/usr/bin/elvish"}
    home.machine = connect.dataclasses.replace(home.machine, environ=environ)

    plan = home.connect("shell")

    assert "elvish reads no file that is written here" in " ".join(plan.hints)
    assert "~/.config/ocp/env.sh" in " ".join(plan.hints)
    assert not (home.folder / ".profile").exists()


NASTY = "it's!$HOME\\!\\a\"b`c`!!#x"


@pytest.mark.skipif(not shutil.which("tcsh"), reason="no tcsh: apt-get install tcsh")
def test_csh_reads_a_key_of_any_characters_as_it_is(home: Home) -> None:
    home.put(".cshrc", "")

    home.connect("shell", server=SERVER._replace(key=NASTY))

    assert in_shell(home, "cshrc").stdout == f"{NASTY}\n"


def test_nushell_has_a_file_of_its_own(home: Home) -> None:
    (home.folder / ".config/nushell").mkdir(parents=True)

    plan = home.connect("shell", server=SERVER._replace(key='a"b\\c'))

    text = (home.folder / ".config/nushell/autoload/ocp.nu").read_text()
    assert '$env.OPENAI_API_KEY = "a\\"b\\\\c"' in text.splitlines()
    assert any("from 0.101 on" in note for edit in plan.edits for note in edit.notes)
    home.undo()
    assert home.files() == {}


def test_nushell_keeps_its_settings_elsewhere_on_macos(tmp_path: Path) -> None:
    home = Home(tmp_path / "mac", "darwin")
    folder = "Library/Application Support/nushell"
    (home.folder / folder).mkdir(parents=True)

    assert f"{home.folder}/{folder}/autoload/ocp.nu" in [
        edit.path for edit in home.plan("shell").edits]


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish: apt-get install fish")
def test_fish_reads_a_key_of_any_characters_as_it_is(home: Home) -> None:
    (home.folder / ".config/fish").mkdir(parents=True)
    home.connect("shell", server=SERVER._replace(key=NASTY))

    done = subprocess.run(
        ["fish", "-c", "printf %s $OPENAI_API_KEY"], capture_output=True, text=True, check=True,
        env={**os.environ, "HOME": str(home.folder), "XDG_CONFIG_HOME": ""})

    assert done.stdout == NASTY


def test_fish_has_a_file_of_its_own(home: Home) -> None:
    (home.folder / ".config/fish").mkdir(parents=True)
    home.connect("shell", server=SERVER._replace(key="it's\\here"))

    text = (home.folder / ".config/fish/conf.d/ocp.fish").read_text()
    assert "set -gx OPENAI_API_KEY 'it\\'s\\\\here'" in text


def test_a_setting_in_fishs_own_file_that_wins_is_named(home: Home) -> None:
    home.put(".config/fish/config.fish", "# mine\nset -gx OPENAI_API_KEY mine\n")

    plan = home.connect("shell")

    notes = [note for edit in plan.edits for note in edit.notes]
    assert notes == ["line 2 of config.fish sets OPENAI_API_KEY after OCP's lines and overrides "
                     "them: remove it"]


def test_systemd_hands_the_variables_to_the_desktop(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", has_systemd=True)
    home.connect("shell")

    lines = (home.folder / ".config/environment.d/ocp.conf").read_text().splitlines()
    assert f"OPENAI_API_KEY={KEY}" in lines and f"OPENAI_BASE_URL={SERVER.api}" in lines
    home.undo()
    assert home.files() == {}


def test_a_key_that_environment_d_might_misread_is_not_put_there(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", has_systemd=True)

    plan = home.plan("shell", server=SERVER._replace(key="a$b"))

    assert not [edit for edit in plan.edits if "environment.d" in edit.path]
    assert any("environment.d" in hint for hint in plan.hints)


FAKE_LAUNCHCTL = """#!/bin/sh
echo "$@" >> "$HOME/calls"
case $1 in
  getenv) cat "$HOME/session-$2" 2> /dev/null ;;
  setenv) printf %s "$3" > "$HOME/session-$2" ;;
  unsetenv) rm -f "$HOME/session-$2" ;;
esac
exit 0
"""


def test_on_macos_the_session_is_set_now_and_at_each_login(tmp_path: Path) -> None:
    home = Home(tmp_path / "mac", "darwin")
    home.put("bin/launchctl", FAKE_LAUNCHCTL).chmod(0o755)
    home.put("session-OPENAI_API_KEY", "before")
    environ = {"PATH": f"{home.folder}/bin:/usr/bin:/bin", "HOME": str(home.folder),
               "SHELL": "/bin/zsh"}
    home.machine = connect.dataclasses.replace(home.machine, environ=environ)

    home.connect("shell")
    agent = home.folder / "Library/LaunchAgents/dev.ocp.environment.plist"
    parsed = plistlib.loads(agent.read_bytes())
    assert (home.folder / "session-OPENAI_API_KEY").read_text() == KEY
    assert not home.plan("shell").session
    home.undo()

    assert parsed["RunAtLoad"] is True and f"setenv OPENAI_API_KEY {KEY}" in (
        parsed["ProgramArguments"][2])
    assert not agent.exists() and not (home.folder / "session-OPENAI_BASE_URL").exists()
    assert (home.folder / "session-OPENAI_API_KEY").read_text() == "before"


# ---------------------------------------------------------------------------
# Odd but good files
# ---------------------------------------------------------------------------

ODD = [
    ("continue", "name: L\nversion: 1.0.0\nschema: v1\nmodels: []\n"),
    ("continue", "name: L\nmodels:\n- name: a\n  provider: b\n"),
    ("continue", "models: # none yet\nname: L\n"),
    ("continue", "name: L\nmodels:\n  - name: a\n\n# about rules\nrules:\n  - x"),
    ("continue", "---\nname: L\nmodels:\n    - name: a\n    - name: b\n"),
    ("opencode", "{}"), ("opencode", "{ }\n"), ("opencode", "{\n}\n"),
    ("opencode", '{"a": 1}'), ("opencode", '{"a": 1,}'), ("opencode", "{\n  // nothing yet\n}\n"),
    ("opencode", '{"provider": {}}\n'), ("opencode", '{"provider": {"x": {}}, "z": [1, 2]}\n'),
    ("opencode", '{\n\t"a": "b{}//" /* } */,\n\t"c": {"d": null,},\n}'),
    ("codex", "[a]\nb = 1\n"), ("codex", "# only this"), ("codex", "a.b = 'c'\nd = {e = [1,\n2]}"),
    ("codex", 'a = 1\n[[b]]\nc = 1\n[[b]]\nc = 2\n["d.e".f]\ng = 1979-05-27\n'),
    ("aider", "# nothing\n"), ("aider", "---\ndark-mode: true\n"),
    ("aider", "a: |\n  b\n  c\nd: e"),
    ("llm", "- model_id: a\n- model_id: b"), ("llm", "# none\n\n"),
    ("zed", '{"agent": {"default_profile": "write"}}'),
]


@pytest.mark.parametrize("tool, text", ODD)
def test_an_odd_file_takes_the_change_and_comes_back(home: Home, tool: str, text: str) -> None:
    path = home.put(CASES[tool].path, text)

    plan = home.connect(tool)

    assert not plan.manual and not home.plan(tool).edits
    after, comment = path.read_text(), CASES[tool].comment
    path.write_text(f"{after}\n{comment}\n")
    home.undo()
    assert same(tool, path.read_text(), f"{text}\n{comment}\n")


def same(tool: str, one: str, other: str) -> bool:
    """Whether two texts say the same with the same comments, whatever their white space."""
    if CASES[tool].comment.startswith("//"):
        sides = [(connect.json_load(each), connect.json_comments(each)) for each in (one, other)]
        return bool(sides[0] == sides[1])
    words = [each.replace("[]", "").split() for each in (one, other)]
    return words[0] == words[1]


UNSAFE = [
    ("continue", "models: *shared\n"), ("continue", "a: 1\na: 2\n"),
    ("continue", "models: [{name: a}]\n"), ("continue", "a: 1\n---\nb: 2\n"),
    ("continue", "models:\n  - name: |+\n      x\n\n"), ("continue", "\tname: x\n"),
    ("continue", "models: one\n"), ("continue", '"a\n b": 1\n'),
    ("llm", "a: 1\n"), ("llm", "[]\n"),
    ("codex", 'a = """\n'), ("codex", "a = [1\n"), ("codex", "a = 1\na = 2\n"),
    ("codex", "nonsense\n"), ("codex", "model_providers = {}\n"), ("aider", "- a\n"),
    ("continue", "- a\n"),
    ("aider", "a: |\n  b"), ("llm", "- a: >-\n    b"),
    ("opencode", '{"a": 1, "a": 2}'), ("opencode", "[]"), ("opencode", '{"provider": 1}'),
    ("opencode", '{"a": 1 "b": 2}'),
    ("opencode", '{"provider": {"ocp": {"options": {"baseURL": "%s", /* mine */}}}}' % SERVER.api),
]


@pytest.mark.parametrize("tool, text", UNSAFE)
def test_what_cannot_be_proved_safe_is_printed_instead(home: Home, tool: str, text: str) -> None:
    path = home.put(CASES[tool].path, text)

    plan = home.connect(tool)

    assert path.read_text() == text
    assert [each.path for each in plan.manual] == [str(path)], plan


# ---------------------------------------------------------------------------
# The editors against texts made by chance
# ---------------------------------------------------------------------------

def random_json(chance: random.Random, depth: int = 0) -> str:
    """An object as somebody careless writes it."""
    def space() -> str:
        return chance.choice(["", " ", "\n", "\n  ", " // c}\n", "/* , */", "\t"])

    def value() -> str:
        if depth < 3 and chance.random() < 0.4:
            return random_json(chance, depth + 1)
        return chance.choice(["1", '"x"', "null", '"{\\"//"', "[1, 2]", "[]", "true", "-0.5e3"])

    names = chance.sample("abcdefgh", chance.randint(0, 4))
    members = [f'{space()}"{name}"{space()}:{space()}{value()}{space()}' for name in names]
    tail = "," if members and chance.random() < 0.3 else ""
    return "{" + ",".join(members) + tail + space() + "}"


@pytest.mark.parametrize("block", range(10))
def test_a_value_put_into_any_json_is_there_and_goes_again(block: int) -> None:
    proved = [put_and_take_out(random.Random(seed))
              for seed in range(block * 100, block * 100 + 100)]

    # The others are refused, and left as they are.
    assert sum(proved) > 50


def put_and_take_out(chance: random.Random) -> bool:
    """Puts something into a text and takes it out again; False if that was refused as unsafe."""
    text = random_json(chance)
    loaded = connect.json_load(text)
    path = tuple(chance.sample("abcxyz", chance.randint(1, 3)))
    value = chance.choice([1, "two", {"three": [4]}, {}])
    try:
        put = connect.apply_changes(text, "json", [connect.SetValue(path, value)])
    except connect.UnsafeEdit:
        return False  # Something else than an object is in the way, or a comment inside.
    assert connect.json_find(put, path) == value
    if connect.json_find(text, path) is None:
        depth = next((n for n in range(len(path) - 1, 0, -1)
                      if connect.json_find(text, path[:n]) is not None), 0)
        done = connect.Applied(path, value, None, depth, False)
        dropped, kept = connect.remove_changes(put, "json", [done], None, False)
        assert (connect.json_load(dropped), kept) == (loaded, [])
        assert connect.json_comments(dropped) == connect.json_comments(text)
    return True


@pytest.mark.parametrize("seed", range(40))
def test_the_toml_reader_finds_what_tomllib_finds(seed: int) -> None:
    tomllib = pytest.importorskip("tomllib")
    chance = random.Random(seed)
    values = ["1", '"a # b"', "'[c]'", "[1, # x]\n 2]", '"""\n[d]\ne = 1\n"""', "{a = {b = 1}}",
              "true", "'''\n'''", "1979-05-27T07:32:00Z", '"\\"="']
    lines = [f"k{n} = {chance.choice(values)}  # c" for n in range(chance.randint(0, 3))]
    for table in range(chance.randint(0, 3)):
        lines.append(chance.choice([f"[t{table}]", f'[ t{table} . "u v" ] # x', f"[[t{table}]]"]))
        lines += [f"  k{n}={chance.choice(values)}" for n in range(chance.randint(0, 2))]
    text = chance.choice(["\n", "\r\n"]).join(lines)
    changes = [connect.SetValue(("model",), "m"), connect.Block(("[z.y]", 'x = "w"'))]

    after = connect.apply_changes(text, "toml", changes)

    wanted = {**tomllib.loads(text), "model": "m", "z": {"y": {"x": "w"}}}
    assert tomllib.loads(after) == wanted


# ---------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("text, wanted", [
    ('"apiKey": "sk-1234567890"', '"apiKey": "sk..."'),
    ("export OPENAI_API_KEY=abcdefgh", "export OPENAI_API_KEY=ab..."),
    ("openai-api-key: plainsecret", "openai-api-key: pl..."),
    ('"max_tokens": 64000', '"max_tokens": 64000'),
    ('"supportsPromptCacheKey": true', '"supportsPromptCacheKey": true'),
    ('"apiKey": "{file:/x/key}"', '"apiKey": "{file:/x/key}"'),
    ("it says ocp_" + "a" * 32, "it says ocp_aaaa...aaaa"),
])
def test_keys_are_masked_and_nothing_else(text: str, wanted: str) -> None:
    assert connect.masked(text, "") == wanted


@pytest.mark.parametrize("host, port, https, wanted", [
    ("mac.local", None, False, "http://mac.local:3456"),
    ("10.0.0.7:8080", None, False, "http://10.0.0.7:8080"),
    ("10.0.0.7", 99, True, "https://10.0.0.7:99"),
    ("https://x.example/", None, False, "https://x.example:443"),
    ("x.example", None, True, "https://x.example:3456"),
    ("https://x.example/ai/ocp/v1", None, False, "https://x.example:443/ai/ocp"),
    ("x.example/ocp/", None, False, "http://x.example:3456/ocp"),
    ("::1", None, False, "http://[::1]:3456"),
    ("[::1]:80", None, False, "http://[::1]:80"),
    ("http://10.0.0.7:8080/v1/", None, False, "http://10.0.0.7:8080"),
])
def test_the_address_of_the_server(
    host: str, port: int | None, https: bool, wanted: str
) -> None:
    assert connect.server_address(host, port, https) == wanted


@pytest.mark.parametrize("host", [
    "", "a b", "user@host", "ftp://x", "a/b:c", "x:99999", "-\n", "a..b", "a" * 70, "x/a b",
    "x/..;y", "x?a=1", "x//y", "https://x/$(id)"])
def test_a_wrong_address_is_refused(host: str) -> None:
    with pytest.raises(connect.Problem):
        connect.server_address(host, None, False)


def test_a_certificate_that_is_not_trusted_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Json, **__: Json) -> Json:
        raise connect.HttpProblem("unreachable", "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")

    monkeypatch.setattr(connect, "fetch_json", failing)

    with pytest.raises(connect.Problem, match="SSL_CERT_FILE"):
        connect.ask_health("https://h:1")


def test_this_machine_knows_itself() -> None:
    assert connect.is_this_machine("127.0.0.1") and connect.is_this_machine("localhost")
    assert not connect.is_this_machine("192.0.2.1")
