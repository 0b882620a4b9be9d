"""The server's own tools for tenants: which commands may run, and what of skills may be read."""
from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from depth import by_depth
from project import load_script

ocp = load_script("ocp_server.py")

Json = Any


def words_of(row: Json) -> list[str]:
    """A command with all options of a row."""
    words = list(row.words)
    for name, takes_value in row.options.items():
        words += [f"--{name}", "x"] if takes_value else [f"--{name}"]
    return [*words, *["word"] * row.max_words]


def refusal(words: Json, commands: str = "act") -> str:
    with pytest.raises(ocp.OwnToolFailed) as refused:
        ocp.checked_command(words, commands)
    return str(refused.value)


# ---------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("row", ocp.OPENCLAW_COMMANDS, ids=lambda row: " ".join(row.words))
def test_a_command_of_the_table_may_run_with_its_options_from_its_set_on(row: Json) -> None:
    words = words_of(row)
    assert ocp.checked_command(words, "act") == (row, words)
    joined = [*row.words, *(f"--{name}=-5" for name, takes in row.options.items() if takes)]
    assert ocp.checked_command(joined, "act")[0] == row
    if row.least == "act":
        assert "not allowed" in refusal(words, "read")
    assert "not allowed" in refusal(words, "none")
    assert "too many" in refusal([*words, "more"])


@pytest.mark.parametrize("words", [
    ["agent", "--message", "x"], ["config", "set", "a", "b"], ["config", "patch"],
    ["config", "unset", "a"], ["plugins", "install", "x"], ["secrets", "reload"], ["exec-policy"],
    ["approvals", "get"], ["gateway", "stop"], ["devices", "list"], ["pairing", "approve", "x"],
    ["users"], ["skills", "install", "x"], ["agents", "add", "x"], ["agents", "delete", "x"],
    ["nodes", "invoke"], ["nodes", "run"], ["uninstall"], ["reset"], ["update"],
    ["something", "new"], ["cron"], [""], ["--version"], ["cron list"], ["Cron", "list"],
    ["--container", "other", "cron", "list"], ["--profile", "x", "status"], ["--dev", "status"],
    ["cron", "list", "--container", "other"], ["cron", "list", "--url", "ws://evil"],
    ["status", "--profile=x"], ["health", "--token", "x"], ["cron", "list", "--password", "x"],
    ["cron", "list", "--port", "1"], ["cron", "add", "--command", "sh"],
    ["cron", "add", "--command-argv=[]"], ["cron", "add", "--on-exit", "x"],
    ["cron", "edit", "id", "--script", "-"], ["cron", "add", "--trigger-script", "x"],
    ["cron", "add", "--stream-command", "[]"], ["cron", "add", "--webhook", "http://x"],
    ["cron", "add", "--tools", "exec"], ["message", "send", "--media", "/etc/passwd"],
    ["message", "send", "-t", "x"], ["message", "send", "-m", "x"], ["sessions", "list", "--store"],
    ["cron", "list", "--"], ["cron", "list", "-"], ["cron", "list", "--json=1"],
    ["cron", "list", "--js"], ["cron", "list", "--"], ["models", "status", "--probe"],
    ["message", "send", "--message", "--media", "/etc/passwd"], ["cron", "list", "--agent"],
    ["memory", "status", "--fix"], ["message", "send", "--message=x", "--json", "--media=x"],
    ["status", "doctor"], ["health", "gateway", "stop"],
])
def test_whatever_else_openclaw_can_do_is_refused(words: list[str]) -> None:
    told = refusal(words)

    assert "allowed" in told or "needs a value" in told or "too many" in told
    assert len(told) < 2000


@pytest.mark.parametrize("args", [
    None, "cron list", [], ["cron", 5], ["cron", None], {"a": 1}, ["cron", "list", "a\0b"],
    ["memory", "search", "x" * 8_193], ["memory", "search", "\u00e9" * 4_097],
    ["memory", "search", "\ud800"], ["cron", "list", *["--json"] * 63],
])
def test_what_are_no_words_is_refused(args: Json) -> None:
    assert refusal(args).startswith("args: must be 1 to 64 strings")


def test_a_refusal_says_what_is_allowed() -> None:
    assert "cron list" in refusal(["gateway"], "read")
    assert "cron add" not in refusal(["gateway"], "read")
    assert "--agent VALUE" in refusal(["cron", "list", "--url", "x"])


@pytest.mark.parametrize("word", [
    "a;b", "$(touch x)", "`x`", "a\nb", "'\"", "--help", "../../x", "&& rm -rf /", "|", ">",
])
def test_words_stay_words_on_the_way_to_a_container(word: str) -> None:
    tenant = ocp.Tenant("alice", {**ocp.TENANT_PROFILE, "relay": {"container": "a-1"}},
                        {"SECRET": "canary"})
    words = ["memory", "search", word]
    environ = {"PATH": "/bin", "HOME": "/h", "LANG": "C", "CLAUDE_CODE_OAUTH_TOKEN": "token",
               "DOCKER_HOST": "unix:///x", "OCP_ADMIN_KEY": "key"}

    plan = ocp.relay_plan(tenant, "docker", environ, words)

    assert plan.lines == [
        ["docker", "exec", "--", "a-1", "openclaw", *words],
        ["docker", "exec", "--", "a-1", "node", "openclaw.mjs", *words]]
    assert plan.env == {"PATH": "/bin", "HOME": "/h", "LANG": "C", "DOCKER_HOST": "unix:///x"}


def test_a_command_of_a_state_folder_has_the_tenants_variables_and_no_file_outside(
    tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "own").write_text("x")
    (tmp_path / "state" / "out").symlink_to("/etc/passwd")
    (tmp_path / "state-2").mkdir()
    tenant = ocp.Tenant(
        "alice", {**ocp.TENANT_PROFILE, "relay": {"stateDir": str(tmp_path / "state")}},
        {"SECRET": "canary", "node_options": "--require x", "OPENSSL_CONF": "x"})

    def plan(word: str) -> Json:
        return ocp.relay_plan(tenant, "docker", {"PATH": "/bin"}, ["memory", "search", word])

    for word in ("and/or", "home", "/no/such/file", f"{tmp_path}/state/own", "https://x/etc/passwd",
                 "/status", "--query=and/or"):
        assert plan(word).lines == [["openclaw", "memory", "search", word]]
    assert plan("x").env == {
        "PATH": "/bin", "SECRET": "canary", "OPENCLAW_STATE_DIR": str(tmp_path / "state")}
    for word in ("/etc/passwd", "file:///etc/passwd", "etc/passwd", "@/etc/passwd", "~", "~/..",
                 f"{tmp_path}/state/out", f"{tmp_path}/state/../state-2", f"{tmp_path}/state-2",
                 "--query=/etc/passwd", "--query=file:/etc/passwd"):
        with pytest.raises(ocp.OwnToolFailed):
            plan(word)


# ---------------------------------------------------------------------------
# Skills
# ---------------------------------------------------------------------------

def skill(folder: Path, name: str, text: str = "---\nname: x\n---\nDo it.\n") -> Path:
    place = folder / "skills" / name
    place.mkdir(parents=True)
    (place / "SKILL.md").write_text(text)
    return place


@pytest.mark.parametrize(("line", "wanted"), [
    ("description: Plain: with # no comment", "Plain: with"),
    ("description: Plain\n  goes on\n  here", "Plain goes on here"),
    ('description: "Quoted: \\"so\\" \\u00e9"', 'Quoted: "so" \u00e9'),
    ("description: 'It''s so'", "It's so"),
    ('description: "Two\n  lines"', "Two lines"),
    ("description: >-\n  Folded\n  text\n\n  more", "Folded text more"),
    ("description: |\n  Block\n  text", "Block text"),
    ("description: >2- # why\n  Folded", "Folded"),
    ("description:", ""), ("other: x", ""), ('description: "open', '"open'),
    ("description: x" + "y" * 400, "x" + "y" * 296 + "..."),
])
def test_a_description_is_read_as_yaml_writes_it(line: str, wanted: str) -> None:
    for end in ("\n", "\r\n"):
        text = f"---\nname: a\n{line}\nmetadata:\n  description: not this\n---\ndescription: nor"
        assert ocp.front_matter(text.replace("\n", end), "description") == wanted
    assert ocp.front_matter(f"no front matter\n{line}", "description") == ""


def test_a_skill_that_is_copied_in_is_told_at_once_and_one_that_is_taken_out_is_not(
    tmp_path: Path
) -> None:
    catalogues = ocp.Catalogues()
    assert catalogues.text(str(tmp_path)) == ""
    place = skill(tmp_path, "notes", "---\ndescription: Takes notes.\n---\n")
    assert catalogues.text(str(tmp_path)).splitlines()[1:] == ["- notes: Takes notes."]
    (place / "SKILL.md").write_text("---\ndescription: Takes many notes.\n---\n")
    assert "many notes" in catalogues.text(str(tmp_path))
    (place / "SKILL.md").unlink()
    assert catalogues.text(str(tmp_path)) == ""


def test_what_is_no_skill_is_counted_and_not_told(tmp_path: Path) -> None:
    skill(tmp_path, "good")
    for name in ("Bad Name!", "-x", "a" * 65, "a;b"):
        skill(tmp_path, name)
    folder = tmp_path / "skills"
    (folder / "linked").symlink_to(folder / "good")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "linked-main").mkdir()
    (folder / "linked-main" / "SKILL.md").symlink_to("/etc/passwd")
    (folder / "fifo").mkdir()
    os.mkfifo(folder / "fifo" / "SKILL.md")

    found, skipped = ocp.skill_entries(str(tmp_path))

    assert (list(found), skipped) == (["good"], 9)
    assert ocp.Catalogues().text(str(tmp_path)).splitlines()[1:] == ["- good"]
    outside = tmp_path / "other"
    outside.mkdir()
    (outside / "skills").symlink_to(folder)
    assert ocp.skill_entries(str(outside)) == ({}, 0)


def test_the_catalogue_of_many_skills_is_bounded_and_says_so(tmp_path: Path) -> None:
    for number in range(300):
        skill(tmp_path, f"skill-{number:03}", f"---\ndescription: {'x' * 500}\n---\n")

    text = ocp.Catalogues().text(str(tmp_path))

    lines = text.splitlines()
    assert len(text) < 31_000
    assert len([line for line in lines if line.startswith("- skill-")]) == 200
    assert len(lines[1]) < 330
    assert lines[-2:] == ["100 more are not listed.",
                          "The last ones are listed without their descriptions."]


def test_a_file_of_an_own_skill_is_read_and_no_other(tmp_path: Path) -> None:
    alice, bob = tmp_path / "alice", tmp_path / "bob"
    place = skill(alice, "notes", "Read references/more.md.\n")
    (place / "references").mkdir()
    (place / "references" / "more.md").write_text("More.")
    skill(bob, "secret", "of bob")
    (place / "link").symlink_to("/etc/passwd")
    (place / "folder-link").symlink_to(bob / "skills" / "secret")
    os.mkfifo(place / "fifo")
    (place / "big").write_text("x" * 2_000_000)
    (place / "long").write_text("\u20ac" * 100_001)
    (place / "binary").write_bytes(b"\xff\xfe\x00")
    (place / "zero").write_bytes(b"a\0b")
    (alice / "skills" / "linked").symlink_to(bob / "skills" / "secret")

    def read(name: str, path: str = "SKILL.md") -> Json:
        return ocp.skill_file(str(alice), name, path)

    assert read("notes", "references/more.md") == "More."
    assert read("notes").startswith("Read references/more.md.")
    assert "- references/more.md" in read("notes") and "link" not in read("notes")
    for name, path in (
        ("notes", "../../../bob/skills/secret/SKILL.md"), ("notes", "/etc/passwd"),
        ("notes", "link"), ("notes", "folder-link/SKILL.md"), ("notes", "fifo"), ("notes", "big"),
        ("notes", "long"), ("notes", "binary"), ("notes", "zero"), ("notes", "."), ("notes", ""),
        ("notes", "references"), ("notes", "references/../SKILL.md"), ("notes", "a\0b"),
        ("notes", "no-such"), ("linked", "SKILL.md"), ("../../bob/skills/secret", "SKILL.md"),
        ("..", "SKILL.md"), ("", "SKILL.md"), ("notes", "references//more.md"),
        ("notes", "/".join("abcdefgh")),
    ):
        assert read(name, path) is None, (name, path)


def test_a_skill_of_many_folders_is_listed_in_part_and_without_those_that_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = skill(tmp_path, "notes", "Read.\n")
    for number in range(300):
        (place / str(number) / "deeper").mkdir(parents=True)
    (place / "open.md").write_text("x")
    opened: list[str] = []

    def open_file(name: str, *words: Json, **more: Json) -> int:
        opened.append(name)
        if name.isdecimal():
            raise PermissionError(13, "Permission denied")
        return os_open(name, *words, **more)

    os_open = os.open
    monkeypatch.setattr(os, "open", open_file)

    assert ocp.skill_file(str(tmp_path), "notes", "SKILL.md") == (
        "Read.\n\n\nFiles of this skill:\n- open.md")
    assert sum(map(str.isdecimal, opened)) == 99


def test_a_file_that_becomes_a_link_meanwhile_is_never_followed(tmp_path: Path) -> None:
    place = skill(tmp_path, "notes")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("canary")
    (place / "folder").mkdir()
    (place / "folder" / "file").write_text("own")
    ended = threading.Event()

    def swap() -> None:
        link = place / "link"
        link.symlink_to(outside)
        while not ended.is_set():
            os.rename(place / "folder", place / "kept")
            os.rename(link, place / "folder")
            os.rename(place / "folder", link)
            os.rename(place / "kept", place / "folder")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        found = {ocp.skill_file(str(tmp_path), "notes", "folder/file")
                 for _ in range(by_depth(100, 100, 5_000))}
    finally:
        ended.set()
        thread.join()
    assert "canary" not in found
    assert found <= {"own", None}
