"""`ocp tenants import`: the tenants of a config.yaml of cc-gateway, with their keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

from project import REPO
from tenants_lab import Lab, tenants, tenants_lab

DATA = REPO / "tests/kit/data"
KEY, OTHER_KEY = "0123456789abcdef" * 4, "fedcba9876543210" * 4
CONFIG = f"""# The tenants of this house.
server:
  port: PORT
  host: 0.0.0.0
  docker_host_ip: 172.17.0.1
cli:
  bin: claude
  timeout: 9000000
  max_concurrent: 3
  effort: low
session:
  ttl: 7200
  cleanup_interval: 900
tenants:
  - name: dc
    api_key: {KEY}
    env:
      GITHUB_TOKEN: ghp_secret
      RETRIES: 3
      VERBOSE: true
      PATH: /evil
      vars:
        NOTES: |
          one
          two
      shellEnv:
        enabled: true
  - name: Amanda's bot
    api_key: short
    colour: red
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tenants_lab(tmp_path) as made:
        yield made


def config(lab: Lab, text: str = CONFIG) -> str:
    path = lab.home / "config.yaml"
    path.write_text(text.replace("PORT", str(lab.port)))
    return str(path)


def skill(folder: Path, text: str = "---\nname: x\n---\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "SKILL.md").write_text(text)
    return folder


# ---------------------------------------------------------------------------
# The tenants
# ---------------------------------------------------------------------------

def test_tenants_keep_their_keys_which_work_at_once(lab: Lab) -> None:
    lab.docker.compose("openclaw")

    ran = lab.run("import", config(lab), "--yes")

    assert ran.code == 0, ran
    assert lab.server.holder(KEY) == "dc"
    assert lab.server.keys["dc"]["maxConcurrent"] == 1
    assert lab.server.tenants["dc"]["env"] == {
        "GITHUB_TOKEN": "ghp_secret", "RETRIES": "3", "VERBOSE": "true", "NOTES": "one\ntwo\n"}
    assert lab.server.tenants["dc"]["profile"]["instance"]["where"] == (
        "openclaw-openclaw-gateway-1")
    assert len(lab.server.keys["amanda-s-bot"]["secret"]) == 36
    for line in ("the variable PATH is left out", "its key is not 32 to 128 letters",
                 "colour is an unknown field",
                 "ocp settings maxConcurrent 3", "ocp settings timeout 3600000",
                 "ocp settings sessionTTL 7200000", "A model that is not known is an error"):
        assert line in ran.stdout
    assert not [word for word in (KEY, "ghp_secret") if word in ran.stdout + ran.stderr]


def test_a_second_import_changes_nothing(lab: Lab) -> None:
    lab.run("import", config(lab), "--yes")
    before, calls = lab.everything(), len(lab.server.calls)

    ran = lab.run("import", config(lab))

    assert ran.code == 0 and ran.stdout.count("  nothing to do\n") == 2, ran
    assert lab.everything() == before
    assert {call.method for call in lab.server.calls[calls:]} == {"GET"}


def test_a_dry_run_changes_nothing(lab: Lab) -> None:
    path = config(lab)
    before = lab.everything()

    ran = lab.run("import", path, "--dry-run")

    assert ran.code == 0 and "dc            its key, tenant, 4 variables" in ran.stdout
    assert lab.everything() == before and not lab.server.keys


def test_a_tenant_that_was_imported_is_set_up_with_the_key_that_it_had(lab: Lab) -> None:
    root = lab.docker.compose("openclaw", reach=lab.reach())
    lab.run("import", config(lab), "--yes")

    ran = lab.run("apply", "dc", "--yes")

    assert ran.code == 0, ran
    assert (root / "home/node/.openclaw/ocp-key").read_text().strip() == KEY


def test_a_key_with_another_secret_is_named_and_the_others_are_taken_over(lab: Lab) -> None:
    lab.server.keys["dc"] = {"id": 1, "name": "dc", "secret": "s" * 40}

    ran = lab.run("import", config(lab), "--yes")

    assert ran.code == 1 and "there is a key dc already, with another secret" in ran.stdout
    assert lab.server.keys["dc"]["secret"] == "s" * 40 and "amanda-s-bot" in lab.server.tenants


def test_a_key_that_the_server_has_already_is_kept_here_so_that_apply_does_not_replace_it(
    lab: Lab
) -> None:
    lab.docker.compose("openclaw", reach=lab.reach())
    lab.server.keys["dc"] = {"id": 1, "name": "dc", "secret": KEY}

    assert lab.run("import", config(lab), "--yes").code == 0
    assert lab.run("apply", "dc", "--yes").code == 0
    assert lab.server.keys["dc"]["secret"] == KEY


def test_two_tenants_that_get_one_name_are_not_mixed(lab: Lab) -> None:
    text = f"tenants:\n- name: a b\n  api_key: {KEY}\n- name: a.b\n  api_key: {OTHER_KEY}\n"

    ran = lab.run("import", config(lab, text), "--yes")

    assert ran.code == 1 and "two tenants have this name" in ran.stdout
    assert lab.server.keys["a-b"]["secret"] == KEY


def test_a_step_that_fails_is_made_up_for_by_the_next_import(lab: Lab) -> None:
    lab.server.fail["PUT .*/tenant"] = 1

    assert lab.run("import", config(lab), "--yes").code == 1
    assert lab.run("import", config(lab), "--yes").code == 0
    assert lab.server.tenants.keys() == {"dc", "amanda-s-bot"}


def test_a_working_folder_is_the_instance_if_it_is_one(lab: Lab) -> None:
    local = lab.local(".openclaw-x")
    text = (f"tenants:\n  - name: one\n    api_key: {KEY}\n    working_dir: {local.parent}\n"
            f"  - name: two\n    api_key: {OTHER_KEY}\n    working_dir: {lab.home}\n")

    ran = lab.run("import", config(lab, text), "--yes")

    assert "is not an OpenClaw state folder" in ran.stdout
    assert lab.server.tenants["one"]["profile"]["instance"]["where"] == str(local.parent)
    assert lab.server.tenants["two"]["profile"]["instance"] is None


def test_skills_are_copied_by_the_rules_of_skills(lab: Lab) -> None:
    folder = lab.home / "skills"
    skill(folder / "dc/notes")
    (skill(folder / "dc/weather") / "secret").symlink_to("/etc/passwd")
    skill(folder / "dc/bad name")
    lab.run("import", config(lab), "--yes")

    ran = lab.run("import", config(lab), "--yes", "--skills", str(folder))

    own = lab.ocp_home / "tenants/dc/skills"
    assert ran.code == 0 and "dc            2 skills" in ran.stdout
    assert sorted(each.name for each in own.rglob("*")) == [
        "SKILL.md", "SKILL.md", "notes", "weather"]
    (own / "notes/SKILL.md").write_text("mine")
    ran = lab.run("import", config(lab), "--yes", "--skills", str(folder))
    assert "dc            nothing to do" in ran.stdout
    assert (own / "notes/SKILL.md").read_text() == "mine"


def test_another_port_is_said_since_instances_ask_there(lab: Lab) -> None:
    text = CONFIG.replace("PORT", "3999")

    ran = lab.run("import", config(lab, text), "--yes")

    assert "start this server on its port: CLAUDE_PROXY_PORT=3999" in ran.stdout


# ---------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------

def test_what_js_yaml_writes_is_read_as_js_yaml_reads_it() -> None:
    read = tenants.YamlReader((DATA / "js_yaml.yaml").read_text()).document()

    assert read == json.loads((DATA / "js_yaml.json").read_text())


REFUSED = [
    ("a: &x 1", 1, "an anchor"), ("a: 1\nb: *x", 2, "an anchor"), ("a: !!int 1", 1, "a tag"),
    ("a: [1]", 1, "on one line"), ("a: {b: 1}", 1, "on one line"), ("a: 1\n\tb: 2", 2, "a tab"),
    ("a: 1\n\na: 2", 3, "a is there twice"), ("a: 'x", 1, "does not end on its line"),
    ('a: "x', 1, "does not end on its line"), ('a: "x" y', 1, "quoted string"),
    ("a: b: c", 1, "put it into quotes"), ("a: 1\n  more", 2, "deeper"), ("a: one\n two", 2, "dee"),
    ("a", 1, "name and a colon"), ("? a", 1, "name and a colon"), ("a: @x", 1, "not a plain"),
    ("<<: 1", 1, "name and a colon"), ("a: |x\n  b", 1, "invalid start"),
    ("a:\n    b: 1\n  c: 2", 3, "deeper"), ("a: 2024-01-01", 1, "not a string"),
    ("a: .inf", 1, "not a string"),
    ("a: 1\n---\nb: 2", 2, "name and a colon"), ('a: "\\q"', 1, "unknown escape"),
    ("%YAML 1.2", 1, "a name"), ("- a\nb: 1", 2, "does not belong"), ("a: - b", 1, "plain"),
    ("a:\n  - b\n   - c", 3, "deeper"), ("- " * 5000 + "a", 1, "nested too deeply"),
    ("".join(" " * depth + "a:\n" for depth in range(99)), 51, "nested too deeply")]


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED)
def test_what_the_reader_is_not_sure_of_is_refused_with_its_line(
    text: str, line: int, reason: str
) -> None:
    with pytest.raises(tenants.Problem) as told:
        tenants.YamlReader(text).document()
    assert re.match(f"line {line}: .*{reason}", str(told.value)), told.value


@pytest.mark.parametrize("text", [b"a: &x 1", b"tenants: 1", b"tenants:\n  - a", b"\xff", b""])
def test_a_file_that_cannot_be_read_is_refused_with_the_commands_to_do_it_by_hand(
    lab: Lab, text: bytes
) -> None:
    path = lab.home / "config.yaml"
    path.write_bytes(text)

    ran = lab.run("import", str(path), "--yes")

    assert ran.code == 1 and "ocp tenants add NAME --secret-stdin" in ran.stderr
    assert not lab.server.keys


def test_a_file_that_is_not_there_is_named(lab: Lab) -> None:
    assert "There is no file /nowhere." in lab.run("import", "/nowhere").stderr


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 9000, "1e" + "9" * 5000])
def test_a_number_that_no_program_can_hold_is_a_text(lab: Lab, number: str) -> None:
    text = f"tenants:\n  - name: one\n    api_key: {KEY}\n    env:\n      A: {number}\n"

    assert lab.run("import", config(lab, text), "--yes").code == 0
    assert lab.server.tenants["one"]["env"] == {"A": number}


def test_an_instance_of_another_tenant_is_not_taken_over(lab: Lab) -> None:
    local = lab.local()
    lab.run("setup", "--yes")
    row = f"  - name: NAME\n    api_key: KEY\n    working_dir: {local.parent}\n"
    text = "tenants:\n" + row.replace("NAME", "one").replace("KEY", KEY)

    ran = lab.run("import", config(lab, text), "--yes")

    assert ran.code == 1 and "is the instance of the tenant openclaw-local" in ran.stdout
    lab.run("remove", "openclaw-local", "--yes")
    text += row.replace("NAME", "two").replace("KEY", OTHER_KEY)
    ran = lab.run("import", config(lab, text), "--yes")
    assert ran.code == 1 and "two  FAILED: two tenants have the instance" in ran.stdout
    assert list(lab.server.tenants) == ["one"]


def test_documents_by_hand_are_read_too() -> None:
    text = ("---\r\n# c\r\na:   # none\r\n- 'x' # c\r\n-   b: |+\r\n       t\r\n\r\n    c: >2\r\n"
            "         d\r\n\r\n-\r\n  - 1\r\n  -\r\ne: ~\r\n")

    read: Any = tenants.YamlReader(text).document()

    assert read == {"a": ["x", {"b": "t\n\n", "c": "   d\n"}, [1, None]], "e": None}
