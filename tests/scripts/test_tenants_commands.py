"""The commands of `ocp tenants` for one tenant, the .env of a compose project, and the page."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from fake_tenants_api import BLOCKED, PROFILE
from project import REPO
from tenants_lab import Lab, tenants, tenants_lab

STATE = "home/node/.openclaw"
PAGE = REPO / "docs/tenants.md"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tenants_lab(tmp_path) as made:
        yield made


def container(lab: Lab, name: str = "alice", **more: Any) -> Path:
    return lab.docker.compose(name, **{"reach": lab.reach(), **more})


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------

GATEWAY = """server:
  port: PORT
cli:
  max_concurrent: 3
  timeout: 900000
tenants:
  - name: dc
    api_key: 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
    env:
      GITHUB_TOKEN: ghp_example
  - name: amanda
    api_key: amanda-1
"""


def before_sample(lab: Lab, root: Path, name: str) -> None:
    """Make what a sample of the page shows."""
    there, own = root / STATE / "workspace/skills", lab.ocp_home / "tenants/alice/skills"
    if name == "discover":
        for each in ("custom-tool", "weather"):
            (there / each).mkdir(parents=True)
            (there / each / "SKILL.md").write_text(each)
    elif name == "skills_diff":
        (there / "custom-tool/SKILL.md").write_text("changed")
        (there / "custom-tool/run.py").write_text("new")
        (there / "weather/data").symlink_to("/etc")
        (own / "notes").mkdir()
        (own / "notes/SKILL.md").write_text("notes")
    elif name == "import":
        Path("config.yaml").write_text(GATEWAY.replace("PORT", str(lab.port)))


def test_the_samples_of_the_page_are_what_is_shown(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.home)
    root = container(lab)
    lab.docker.add("openclaw-cell-bob", is_running=False, config="{}")
    lab.local()
    text = PAGE.read_text()
    for name, line in re.findall(r"(?m)^<!-- (\w+) -->\n```text\n\$ ocp tenants(.*)$", text):
        before_sample(lab, root, name)
        ran = lab.run(*line.split())
        assert ran.stderr == "", name
        shown = ran.stdout.replace(str(lab.port), "3456").replace(str(lab.ocp_home), "~/.ocp")
        block = f"<!-- {name} -->\n```text\n$ ocp tenants{line}\n"
        before, _, after = text.partition(block)
        text = before + block + shown + after[after.index("```"):]
    if os.environ.get("OCP_UPDATE_DOCS"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text


@pytest.mark.parametrize("words, passed", [
    ((), ()), (("--folder", "/x"), ("--folder", "/x")), (("--shared", "--json"),
                                                         ("--server", "--json"))])
def test_a_login_is_given_by_the_command_of_keys(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], passed: tuple[str, ...]
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(
        tenants.subprocess, "call", lambda command, env: called.append(command))

    assert lab.run("login", "anna", *words).code == 0

    assert called == [[sys.executable, str(REPO / "ocp.py"), "keys", "login", "anna", "--url",
                       lab.server.url, *passed]]


def test_the_page_names_every_command_and_option() -> None:
    text = PAGE.read_text()
    options = {name for group in tenants.ARGUMENTS.values() for names, _ in group
               for name in names if name.startswith("--")}
    missing = {command.name for command in tenants.COMMANDS if command.name not in text}
    missing |= {name for name in options if name not in text}
    assert not missing


# ---------------------------------------------------------------------------
# One tenant
# ---------------------------------------------------------------------------

def test_add_prints_the_key_alone_on_standard_output(lab: Lab) -> None:
    ran = lab.run("add", "alice", "--level", "api")

    assert ran.code == 0 and ran.stdout == f"{lab.server.keys['alice']['secret']}\n"
    assert "will not be shown again" in ran.stderr
    assert lab.server.tenants["alice"]["profile"]["level"] == "api"


def test_add_takes_a_key_from_standard_input(lab: Lab) -> None:
    secret = "a1" * 20

    assert lab.run("add", "alice", "--secret-stdin", stdin=f"{secret}\n").code == 0
    assert lab.server.keys["alice"]["secret"] == secret
    assert lab.run("add", "bob", "--secret-stdin", stdin="short\n").code == 2
    assert lab.run("add", "bob", "--secret-stdin", stdin=f"{secret}\n").code == 1
    assert lab.run("add", "alice", "--secret-stdin", "--existing", stdin="y" * 40).code == 1
    root = container(lab, "carl")
    given = ["add", "carl", "--secret-stdin", "--apply", "--yes"]
    assert lab.run(*given, stdin="z" * 40).code == 0
    assert (root / STATE / "ocp-key").read_text().strip() == "z" * 40


def test_a_key_that_was_added_is_used_by_apply_later(lab: Lab) -> None:
    root = container(lab)
    lab.run("add", "alice")

    ran = lab.run("apply", "alice", "--yes")

    assert ran.code == 0, ran
    assert (root / STATE / "ocp-key").read_text().strip() == lab.server.keys["alice"]["secret"]


def test_add_with_apply_writes_the_instance_and_prints_no_key(lab: Lab) -> None:
    local = lab.local(".openclaw-x")

    ran = lab.run("add", "carol", "--local", "~/.openclaw-x", "--apply", "--yes")

    assert ran.code == 0 and "claude-local" in local.read_text()
    assert lab.server.keys["carol"]["secret"] not in ran.stdout + ran.stderr


def test_a_tenant_gets_an_instance_of_another_name(lab: Lab) -> None:
    local = lab.local(".openclaw-x")
    lab.run("add", "carol")

    said = lab.run("apply", "carol", "--yes").stderr

    assert "ocp tenants add carol --apply --container NAME, or --local DIR" in said
    ran = lab.run("add", "carol", "--apply", "--local", "~/.openclaw-x", "--yes")
    assert ran.code == 0 and "claude-local" in local.read_text()
    assert lab.run("check").stdout == "  carol  as it should be\n"
    assert len(lab.server.keys) == 1


def test_add_refuses_what_is_there(lab: Lab) -> None:
    lab.server.keys["bob"] = {"id": 1, "name": "bob", "secret": "s" * 40}
    lab.run("add", "alice")

    assert "There is a tenant alice already" in lab.run("add", "alice").stderr
    assert "ocp tenants add bob --existing" in lab.run("add", "bob").stderr
    assert lab.run("add", "bob", "--existing").code == 0
    assert lab.server.keys["bob"]["secret"] == "s" * 40 and "bob" in lab.server.tenants


@pytest.mark.parametrize(("words", "code", "reason"), [
    (["--container", "--help"], 2, ""), (["--container=a;b"], 2, "is no container name"),
    (["--container=nobody"], 1, "There is no container nobody"),
    (["--local=/nowhere"], 1, "is not a folder")])
def test_add_refuses_an_instance_that_is_none(
    lab: Lab, words: list[str], code: int, reason: str
) -> None:
    ran = lab.run("add", "alice", "--apply", "--yes", *words)

    assert ran.code == code and reason in ran.stderr and not lab.server.keys


@pytest.mark.parametrize("apply", [("--apply", "--yes"), ()])
@pytest.mark.parametrize(("option", "place", "owner"), [
    ("--local", "~/.openclaw", "openclaw-local"), ("--local", "~/link", "openclaw-local"),
    ("--local", "~/mounted", "alice"), ("--container", "alice-openclaw-gateway-1", "alice")])
def test_add_refuses_the_instance_of_another_tenant(
    lab: Lab, option: str, place: str, owner: str, apply: tuple[str, ...]
) -> None:
    lab.local()
    (lab.home / "mounted").mkdir()
    container(lab, mounts=[{"Type": "bind", "Source": str(lab.home / "mounted"),
                            "Destination": f"/{STATE}"}])
    lab.run("setup", "--yes")
    (lab.home / "link").symlink_to(lab.home / ".openclaw")
    before = lab.everything()

    ran = lab.run("add", "bob", option, place, *apply)

    assert ran.code == 1 and f"is the instance of the tenant {owner}" in ran.stderr, ran
    assert lab.everything() == before and "bob" not in lab.server.keys
    assert lab.run("remove", owner, "--yes").code == 0
    assert lab.run("add", "bob", option, place, *apply).code == 0


def test_add_keeps_the_key_before_the_server_makes_it(lab: Lab) -> None:
    (lab.ocp_home / "tenants").mkdir()
    (lab.ocp_home / "tenants/alice").write_text("in the way")

    ran = lab.run("add", "alice")

    assert ran.code == 1 and "is a link or a file" in ran.stderr and not lab.server.keys


def test_add_uses_a_folder_that_no_setup_made_only_when_told(lab: Lab) -> None:
    (lab.ocp_home / "tenants/alice/skills").mkdir(parents=True)

    ran = lab.run("add", "alice")

    assert ran.code == 1 and "--adopt uses it" in ran.stderr and not lab.server.keys
    assert lab.run("add", "alice", "--adopt").code == 0


def test_a_key_that_cannot_be_revoked_keeps_its_tenant_so_that_it_can_be_removed_again(
    lab: Lab
) -> None:
    lab.run("add", "alice")
    lab.server.fail["DELETE /api/keys/[^/]*"] = 1

    assert lab.run("remove", "alice", "--yes").code == 1
    assert lab.run("remove", "alice", "--yes").code == 0
    assert not lab.server.keys and not lab.server.tenants


@pytest.mark.parametrize("code", [-9, 77])
def test_a_login_that_ends_in_an_unknown_way_has_failed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(tenants.subprocess, "call", lambda *_, **__: code)

    assert lab.run("login", "anna").code == 1


def test_edit_changes_fields_and_takes_the_prompt_from_a_file(lab: Lab, tmp_path: Path) -> None:
    lab.run("add", "alice")
    (tmp_path / "prompt").write_text("You act for Alice.\n")

    ran = lab.run("edit", "alice", "--prompt", str(tmp_path / "prompt"), "--level", "api")

    profile = lab.server.tenants["alice"]["profile"]
    assert ran.code == 0 and profile["prompt"] == "You act for Alice.\n"
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.")
    lab.run("edit", "alice", "--prompt", str(tmp_path / "prompt"))
    assert lab.server.tenants["alice"]["profile"]["prompt"] == "One.\nTwo."
    lab.run("edit", "alice", "--no-prompt")
    assert lab.server.tenants["alice"]["profile"]["prompt"] == ""
    assert lab.run("edit", "alice").code == 2
    assert lab.run("edit", "alice", "--level", "admin").code == 2


def test_a_level_above_the_servers_is_named_with_what_to_do(lab: Lab) -> None:
    lab.server.bound = "api"
    container(lab)

    said = [lab.run("setup", "--yes", "--level", "tools"),
            lab.run("edit", "alice", "--level", "agent"), lab.run("show", "alice"), lab.run("list")]

    assert "OCP_TENANT_LEVEL=tools" in said[0].stdout
    assert "alice: level changed\n" in said[1].stdout
    assert "OCP_TENANT_LEVEL=agent" in said[1].stdout
    assert all("api (set: agent)" in ran.stdout for ran in said[2:])


def test_commands_for_a_tenant_that_is_none_say_so(lab: Lab) -> None:
    lab.server.keys["laptop"] = {"id": 1, "name": "laptop", "secret": "s" * 40}

    for words in (["edit", "laptop", "--level", "api"], ["env", "laptop"], ["show", "laptop"],
                  ["remove", "laptop", "--yes"], ["skills", "diff", "laptop"]):
        ran = lab.run(*words)
        assert ran.code == 1 and "There is no tenant 'laptop': see `ocp tenants`" in ran.stderr


def test_show_tells_everything_but_secrets(lab: Lab) -> None:
    container(lab)
    lab.run("setup", "--yes")
    lab.run("env", "alice", "--set", "A", stdin="value-of-a")

    ran = lab.run("show", "alice")

    shown = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines()[1:])
    assert (shown["level"], shown["instance"]) == ("api", "alice-openclaw-gateway-1")
    assert shown["variables"] == "A" and "value-of-a" not in ran.stdout
    assert lab.json("show", "alice")["place"]["kind"] == "container"


def test_remove_undoes_revokes_and_puts_the_folder_away(lab: Lab) -> None:
    root = container(lab)
    before = lab.tree_of(root)
    lab.run("setup", "--yes")

    ran = lab.run("remove", "alice", "--yes")

    assert ran.code == 0 and lab.tree_of(root) == before
    assert not lab.server.keys and not lab.server.tenants
    [away] = (lab.ocp_home / "tenants/.removed").iterdir()
    assert away.name.startswith("alice-2026") and not (lab.ocp_home / "tenants/alice").exists()
    assert lab.run("setup", "--yes").code == 0


def test_remove_can_keep_the_key_and_delete_the_folder(lab: Lab) -> None:
    lab.run("add", "alice")
    assert lab.run("remove", "alice").code == 2 and "alice" in lab.server.tenants

    assert lab.run("remove", "alice", "--yes", "--keep-key", "--purge").code == 0
    assert "alice" in lab.server.keys and not lab.server.tenants
    assert not list((lab.ocp_home / "tenants").iterdir())


def test_remove_stops_where_the_instance_cannot_be_given_back(lab: Lab) -> None:
    container(lab)
    lab.run("setup", "--yes")
    lab.docker.remove("alice-openclaw-gateway-1")

    ran = lab.run("remove", "alice", "--yes")

    assert ran.code == 1 and "Nothing was removed" in ran.stderr and "alice" in lab.server.keys
    assert lab.run("remove", "alice", "--yes", "--purge").code == 0
    assert not lab.server.keys and not (lab.ocp_home / "tenants/alice").exists()


def test_gen_key_prints_another_key_each_time_and_keeps_nothing(lab: Lab) -> None:
    before = lab.everything()
    keys = {lab.run("gen-key").stdout for _ in range(5)}

    assert len(keys) == 5 and lab.everything() == before and not lab.server.calls
    assert all(re.fullmatch(r"ocp_[A-Za-z0-9]{32}\n", key) for key in keys)


@pytest.mark.parametrize("command", ["list", "discover", "check", "setup", "undo", "gen-key"])
def test_json_is_one_value_and_nothing_else(lab: Lab, command: str) -> None:
    container(lab)

    dry = ["--dry-run"] if command == "setup" else []
    assert isinstance(json.loads(lab.run(command, "--json", *dry).stdout), dict)


@pytest.mark.parametrize("words", [
    ("add", "bob"), ("add", "bob", "--apply"), ("edit", "alice", "--no-prompt"),
    ("remove", "alice"), ("env", "alice", "--unset", "A")])
def test_a_dry_run_changes_nothing_and_tells_it_in_json_too(
    lab: Lab, words: tuple[str, ...]
) -> None:
    container(lab, "bob")
    lab.run("add", "alice")
    before, calls = lab.everything(), len(lab.server.calls)

    told = lab.json(*words, "--dry-run")

    assert told["name"] == words[1] and lab.run(*words, "--dry-run").stdout
    assert lab.everything() == before
    assert {call.method for call in lab.server.calls[calls:]} <= {"GET"}


def test_a_tenant_whose_key_has_any_name_can_be_shown_and_removed(lab: Lab) -> None:
    lab.server.keys["Alice B!"] = {"id": 7, "name": "Alice B!", "secret": "x" * 32}
    lab.server.tenants["Alice B!"] = {
        "profile": dict(PROFILE), "env": {}, "folder": "Alice-B"}

    assert "Alice B!" in lab.run("show", "Alice B!").stdout
    assert lab.run("env", "Alice B!", "--set", "A", stdin="1").code == 0
    assert lab.run("remove", "Alice B!", "--yes").code == 0 and not lab.server.keys
    for name in ("", "a\nb", "x" * 65):
        assert lab.run("show", name).code == 2


@pytest.mark.parametrize("words", [("check",), ("apply", "--yes"), ("skills", "list")])
def test_a_command_for_instances_says_so_where_no_tenant_has_one(
    lab: Lab, words: tuple[str, ...]
) -> None:
    lab.local()
    lab.run("add", "alice")

    assert "No tenant has an instance here: see `ocp tenants discover`" in lab.run(*words).stdout


def test_without_a_command_tenants_are_listed(lab: Lab) -> None:
    assert "There are no tenants" in lab.run().stdout
    lab.run("add", "alice")
    assert lab.run().stdout == lab.run("list").stdout != ""
    assert lab.run("--json").stdout == lab.run("list", "--json").stdout


# ---------------------------------------------------------------------------
# Variables
# ---------------------------------------------------------------------------

def env_of(lab: Lab, name: str = "alice") -> dict[str, str]:
    return dict(lab.server.tenants[name]["env"])


def test_values_of_variables_come_from_standard_input_and_are_never_shown(lab: Lab) -> None:
    lab.run("add", "alice")

    said = [lab.run("env", "alice", "--set", "A", stdin="first\nsecond\n"),
            lab.run("env", "alice", "--set", "B", "--set", "C", stdin="bbb\nccc\n"),
            lab.run("env", "alice"), lab.run("env", "alice", "--json")]

    assert env_of(lab) == {"A": "first\nsecond", "B": "bbb", "C": "ccc"}
    assert said[2].stdout == "  A\n  B\n  C\n"
    assert not [ran for ran in said if "bbb" in ran.stdout or "second" in ran.stdout]
    assert said[1].stdout.startswith("set: B, C\n")
    assert "removed: A\n" in lab.run("env", "alice", "--unset", "A").stdout
    assert env_of(lab).keys() == {"B", "C"}
    for values in ("one", "one\ntwo\nthree\n"):
        assert lab.run("env", "alice", "--set", "D", "--set", "E", stdin=values).code == 2
    assert lab.run("env", "alice", "--set", "PATH", stdin="x").code == 1
    ran = lab.run("env", "alice", "--set", "B")
    assert ran.code == 2 and "the value of B" in ran.stderr and env_of(lab)["B"] == "bbb"


CONFIG = """{
  env: {vars: {A: "a", MULTI: "one\\ntwo", FROM: "${TOKEN}/x", GONE: "${NOBODY}"}, OLD: "old",
        shellEnv: {enabled: true}, PATH: "/evil", ld_preload: "x", "a b": "x"},
  skills: {entries: {
    one: {env: {ONE: "1", HERE: "/home/node/.openclaw/data"}},
    two: {env: {TWO: {source: "env", provider: "default", id: "TOKEN"},
                FILE: {source: "file", provider: "x", id: "value"}, NUMBER: 3}}}}}
"""


def test_every_form_of_a_variable_is_taken_from_an_instance(lab: Lab) -> None:
    container(lab, config=CONFIG, env=["TOKEN=t0ken", "LANG=C"], mounts=[
        {"Type": "bind", "Source": "/srv/alice", "Destination": f"/{STATE}"}])
    lab.run("add", "alice")

    ran = lab.run("env", "alice", "--import")

    assert ran.code == 0, ran
    assert env_of(lab) == {
        "A": "a", "MULTI": "one\ntwo", "FROM": "t0ken/x", "OLD": "old", "ONE": "1",
        "HERE": "/srv/alice/data", "TWO": "t0ken"}
    for line in ("GONE is left out: there is no NOBODY", "PATH is left out: could change claude",
                 "ld_preload is left out", "a b is left out: not a valid",
                 "NUMBER is left out: not a string", "FILE is left out: a reference to file"):
        assert line in ran.stdout
    assert "t0ken" not in ran.stdout


def test_the_containers_own_variables_are_taken_without_those_of_its_image(lab: Lab) -> None:
    container(lab, config="{}", env=["MINE=1", "LANG=C", "FROM_IMAGE=2", "NODE_ENV=production"])
    (lab.docker.folder / "images.json").write_text(json.dumps({
        "ghcr.io/openclaw/openclaw:2026.9.6": ["FROM_IMAGE=2", "LANG=C"]}))
    lab.run("add", "alice")

    assert lab.run("env", "alice", "--import", "--container-env").code == 0
    assert env_of(lab) == {"MINE": "1"}


def test_the_key_of_a_skill_is_left_out_and_it_says_what_to_set(lab: Lab) -> None:
    container(lab, config='{skills: {entries: {weather: {apiKey: "s3cret"}}}}')
    lab.run("add", "alice")

    ran = lab.run("env", "alice", "--import")

    assert ran.code == 0 and "s3cret" not in ran.stdout and not env_of(lab)
    assert "apiKey of weather is left out: set the variable that the skill names" in ran.stdout


def test_no_file_of_an_instance_gets_at_the_admin_key(lab: Lab) -> None:
    lab.local(text='{env: {vars: {A: "${OCP_ADMIN_KEY}", B: "${OCP_URL}"}}}')
    lab.run("setup", "--yes")

    ran = lab.run("env", "openclaw-local", "--import")

    assert "A is left out: there is no OCP_ADMIN_KEY" in ran.stdout
    assert env_of(lab, "openclaw-local") == {"B": lab.server.url}


def test_what_the_server_blocks_is_blocked_here(lab: Lab) -> None:
    names = ["PATH", "HOME", "LD_X", "DYLD_Y", "NODE_OPTIONS", "PYTHONPATH", "CLAUDE_X", "CLAUDE",
             "OPENAI_API_KEY", "http_proxy", "SSL_CERT_FILE", "GIT_DIR", "A", "TOKEN", "PROXY",
             "MAX_X", "Path"]
    assert [bool(tenants._BLOCKED.fullmatch(name)) for name in names] == [
        bool(BLOCKED.fullmatch(name)) for name in names]


# ---------------------------------------------------------------------------
# .env
# ---------------------------------------------------------------------------

DOTENV = ("# ANTHROPIC_API_KEY=commented\nexport ANTHROPIC_API_KEY=exported\n"
          "MY_ANTHROPIC_API_KEY=mine\n ANTHROPIC_BASE_URL=indented\n")


def dotenv_lab(lab: Lab, text: Optional[bytes], **labels: str) -> Path:
    folder = lab.home / "compose"
    folder.mkdir()
    container(lab, labels={
        "com.docker.compose.project.working_dir": str(folder), **labels})
    if text is not None:
        (folder / ".env").write_bytes(text)
        (folder / ".env").chmod(0o640)
    return folder / ".env"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("more", ["", "ANTHROPIC_API_KEY=old\nOTHER=1", "OTHER=1\n"])
def test_two_lines_of_the_dotenv_are_ours_and_undo_gives_it_back(
    lab: Lab, newline: str, more: str
) -> None:
    text = (DOTENV + more).replace("\n", newline).encode()
    path = dotenv_lab(lab, text)

    assert lab.run("setup", "--yes", "--dotenv").code == 0

    after = path.read_bytes().decode()
    secret = lab.server.keys["alice"]["secret"]
    lines = re.split(r"\r?\n", after)
    assert f"ANTHROPIC_API_KEY={secret}" in lines and "ANTHROPIC_API_KEY=old" not in lines
    assert f"ANTHROPIC_BASE_URL=http://172.17.0.1:{lab.port}" in lines
    assert all(line in lines for line in DOTENV.splitlines())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert newline == "\n" or after.count("\n") == after.count("\r\n")
    assert "as it should be" in lab.run("setup", "--yes", "--dotenv").stdout
    lab.run("undo", "--yes")
    assert path.read_bytes() == text


def test_of_a_dotenv_that_was_changed_since_only_our_lines_go(lab: Lab) -> None:
    path = dotenv_lab(lab, b"ANTHROPIC_API_KEY=old\nOTHER=1\n")
    lab.run("setup", "--yes", "--dotenv")
    path.write_text(path.read_text() + "SINCE=1\n")

    lab.run("undo", "--yes")

    assert path.read_text() == "ANTHROPIC_API_KEY=old\nOTHER=1\nSINCE=1\n"


def test_what_was_added_to_a_dotenv_stays_although_its_key_was_written_again(lab: Lab) -> None:
    path = dotenv_lab(lab, b"ANTHROPIC_API_KEY=old")
    lab.run("setup", "--yes", "--dotenv")
    path.write_text(path.read_text() + "SINCE=1\n")
    lab.server.keys["alice"]["secret"] = "elsewhere" * 5

    assert lab.run("apply", "--yes", "--dotenv").code == 0
    assert lab.server.keys["alice"]["secret"] in path.read_text()
    lab.run("undo", "--yes")

    assert path.read_text() == "ANTHROPIC_API_KEY=old\nSINCE=1\n"


def test_a_dotenv_that_changes_before_the_answer_keeps_the_change(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dotenv_lab(lab, b"A=1\n")
    monkeypatch.setattr(tenants, "confirm", lambda *_: path.write_text("A=1\nMEANWHILE=1\n"))

    assert lab.run("setup", "--dotenv").code == 0

    assert "MEANWHILE=1\n" in path.read_text()
    lab.run("undo", "--yes")
    assert path.read_text() == "A=1\nMEANWHILE=1\n"


def test_another_dotenv_is_not_given_back_with_the_text_of_the_first(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    container(lab)
    monkeypatch.chdir(lab.home)
    texts = {"one.env": "", "two.env": "TWO=2\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
        assert lab.run("setup", "--yes", "--dotenv", name).code == 0
    assert Path("one.env").read_text() == ""
    monkeypatch.chdir("/")

    lab.run("undo", "--yes")

    assert {name: (lab.home / name).read_text() for name in texts} == texts


def test_the_dotenv_of_another_name_is_found_by_its_label(lab: Lab) -> None:
    other = lab.home / "alice.env"
    other.write_text("A=1\n")
    path = dotenv_lab(lab, b"B=1\n", **{
        "com.docker.compose.project.environment_file": str(other)})

    lab.run("setup", "--yes", "--dotenv")

    assert "ANTHROPIC_API_KEY" in other.read_text() and path.read_bytes() == b"B=1\n"


def test_a_dotenv_that_is_not_found_or_a_link_is_refused_and_nothing_is_changed(lab: Lab) -> None:
    path = dotenv_lab(lab, None)
    path.symlink_to("/etc/passwd")

    assert "is missing or a link" in lab.run("setup", "--yes", "--dotenv").stdout
    path.unlink()
    assert "its .env was not found" in lab.run("setup", "--yes", "--dotenv").stdout
    assert not lab.server.keys
