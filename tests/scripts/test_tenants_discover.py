"""Which OpenClaw instances `ocp tenants discover` finds on a machine, and how it names them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Iterator

import pytest

from project import REPO
from tenants_lab import Lab, tenants, tenants_lab

STATE = "/home/node/.openclaw"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tenants_lab(tmp_path) as made:
        yield made


# ---------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------

def test_the_gateway_of_a_compose_project_is_found_by_the_projects_name(lab: Lab) -> None:
    lab.docker.compose("alice")

    assert lab.names() == ["alice"]


def test_the_compose_project_of_openclaw_itself_keeps_its_name(lab: Lab) -> None:
    lab.docker.compose("openclaw")

    [found] = lab.json("discover")["instances"]
    assert (found["name"], found["where"]) == ("openclaw", "openclaw-openclaw-gateway-1")


def test_a_cell_of_a_fleet_is_found_by_its_id(lab: Lab) -> None:
    lab.docker.add("openclaw-cell-bob")

    assert lab.names() == ["bob"]


@pytest.mark.parametrize(("container", "name"), [
    ("carol-openclaw-gateway", "carol"), ("carol-openclaw-gateway-2", "carol"),
    ("openclaw-gateway", "openclaw-gateway"), ("my_bot-openclaw-gateway-1", "my-bot")])
def test_a_gateway_without_labels_is_found_by_its_containers_name(
    lab: Lab, container: str, name: str
) -> None:
    lab.docker.add(container)

    assert lab.names() == [name]


def test_an_image_of_openclaw_with_a_state_folder_is_found_whatever_its_name(lab: Lab) -> None:
    mount = {"Type": "bind", "Source": "/srv/bot", "Destination": STATE}
    lab.docker.add("by-mount", mounts=[mount])
    lab.docker.add("by-variable", env=["OPENCLAW_STATE_DIR=/state"], state="/state")
    lab.docker.add("no-state")
    lab.docker.add("no-openclaw", image="postgres:17", mounts=[mount])

    assert lab.names() == ["by-mount", "by-variable"]


def test_the_container_of_the_command_line_is_none(lab: Lab) -> None:
    mount = {"Type": "volume", "Source": "/var/lib/x", "Destination": STATE}
    lab.docker.add("x-openclaw-cli-1", {"com.docker.compose.service": "openclaw-cli"},
                   mounts=[mount])
    lab.docker.add("y-openclaw-cli-run-1a2b", mounts=[mount])

    assert lab.names() == []


def test_stopped_containers_are_found_too(lab: Lab) -> None:
    lab.docker.add("openclaw-cell-bob", is_running=False)

    [found] = lab.json("discover")["instances"]
    assert (found["state"], found["leadsTo"]) == ("stopped", "api.anthropic.com")


def test_local_folders_are_found_with_a_configuration_or_a_workspace(lab: Lab) -> None:
    lab.local(".openclaw")
    lab.local(".openclaw-work")
    (lab.home / ".openclaw-space/workspace").mkdir(parents=True)
    (lab.home / ".openclaw-empty").mkdir()
    (lab.home / ".openclawish").mkdir()

    assert lab.names() == ["openclaw-local", "space", "work"]


def test_a_link_to_another_state_folder_is_no_second_instance(lab: Lab) -> None:
    lab.local(".openclaw-work")
    (lab.home / ".openclaw").symlink_to(".openclaw-work")
    (lab.home / "elsewhere").mkdir()
    (lab.home / "elsewhere/openclaw.json").write_text("{}")
    (lab.home / ".openclaw-moved").symlink_to("elsewhere")

    assert lab.names() == ["moved", "work"]


def test_a_folder_that_a_container_mounts_is_the_containers(lab: Lab) -> None:
    lab.local(".openclaw")
    lab.docker.compose("alice", mounts=[
        {"Type": "bind", "Source": str(lab.home / ".openclaw"), "Destination": STATE}])

    assert lab.names() == ["alice"]


def test_a_folder_below_a_mount_is_the_containers_too(lab: Lab) -> None:
    lab.local(".openclaw")
    lab.docker.compose("alice", mounts=[
        {"Type": "bind", "Source": str(lab.home), "Destination": "/home/node"}])

    assert lab.names() == ["alice"]


def test_two_of_one_name_are_both_in_doubt(lab: Lab) -> None:
    lab.docker.compose("alice")
    lab.local(".openclaw-alice")

    assert lab.names() == ["alice?", "alice?"]
    assert "alice-openclaw-gateway-1 has the same name" in lab.run("discover").stdout


def test_two_containers_with_one_state_folder_are_both_in_doubt(lab: Lab) -> None:
    mount = {"Type": "bind", "Source": "/srv/same", "Destination": STATE}
    lab.docker.compose("alice", mounts=[mount])
    lab.docker.compose("bob", mounts=[mount])

    assert lab.names() == ["alice?", "bob?"]


# ---------------------------------------------------------------------------
# What is said of them
# ---------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "leads_to"), [
    ("{}", "-"),
    ('{agents: {defaults: {model: "anthropic/claude-sonnet-5-5"}}}', "api.anthropic.com"),
    ('{agents: {defaults: {model: "openai/gpt-9"}}}', "openai"),
    ('{agents: {defaults: {model: {primary: "x/y"}}}, models: {providers: {x: {baseUrl: '
     '"https://user:secret@llm.example:8443/v1"}}}}', "llm.example:8443"),
    ('{agents: {defaults: {model: "anthropic/z"}}, env: {vars: {ANTHROPIC_BASE_URL: '
     '"http://10.0.0.9:4000"}}}', "10.0.0.9:4000")])
def test_it_says_where_the_default_model_is_asked(lab: Lab, text: str, leads_to: str) -> None:
    lab.local(text=text)

    assert lab.json("discover")["instances"][0]["leadsTo"] == leads_to


def test_it_counts_the_skills_of_containers_and_folders(lab: Lab) -> None:
    root = lab.docker.compose("alice")
    local = lab.local()
    for place in (root / STATE[1:], local.parent):
        for name in ("workspace/skills/a", "workspace/skills/deep/b", "skills/c"):
            (place / name).mkdir(parents=True)
            (place / name / "SKILL.md").write_text("---\nname: x\n---\n")

    assert [row["skills"] for row in lab.json("discover")["instances"]] == [3, 3]


def test_a_configuration_that_cannot_be_read_is_named_and_the_others_are_listed(lab: Lab) -> None:
    root = lab.docker.compose("alice", config="{ broken")
    other = lab.docker.compose("bob")
    (other / STATE[1:] / "openclaw.json").unlink()
    (other / STATE[1:] / "openclaw.json").symlink_to("/etc/passwd")
    lab.local()

    ran = lab.run("discover")

    assert ran.code == 0 and (root / STATE[1:]).is_dir()
    assert "alice: openclaw.json" in ran.stdout
    assert "bob: /home/node/.openclaw/openclaw.json is a link, or not a regular file" in ran.stdout
    assert "openclaw-local  folder" in ran.stdout


def test_the_table_is_that_of_the_page(lab: Lab) -> None:
    lab.docker.compose("alice")
    lab.docker.add("openclaw-cell-bob", is_running=False, config="{}")
    lab.local()

    assert lab.run("discover").stdout == (
        "  Name            Kind       Where                     State    Leads to           "
        "Skills\n"
        "  alice           container  alice-openclaw-gateway-1  running  api.anthropic.com  "
        "     0\n"
        "  bob             container  openclaw-cell-bob         stopped  -                  "
        "     0\n"
        "  openclaw-local  folder     ~/.openclaw               -        -                  "
        "     0\n")


# ---------------------------------------------------------------------------
# Docker that is not there, or does not answer
# ---------------------------------------------------------------------------

def test_without_docker_folders_are_listed_and_one_line_says_so(lab: Lab) -> None:
    lab.local()
    lab.environ["PATH"] = str(lab.home)

    ran = lab.run("discover")

    assert ran.code == 0 and "openclaw-local  folder" in ran.stdout
    assert ran.stdout.endswith("Containers are not listed: there is no program docker\n")
    assert lab.json("discover")["docker"] == {
        "found": False, "error": "there is no program docker"}


def test_without_its_daemon_docker_is_quoted(lab: Lab) -> None:
    lab.docker.fail(("^ps", 1, "Cannot connect to the Docker daemon at unix:///x."))

    assert "not listed: Cannot connect to the Docker daemon" in lab.run("discover").stdout


def test_a_container_that_goes_meanwhile_hides_no_other(lab: Lab) -> None:
    lab.docker.compose("alice")
    (lab.docker.folder / "gone").write_text("f" * 64)

    assert lab.names() == ["alice"]


def test_docker_that_hangs_is_ended_with_what_it_started(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_words = tenants.run_words
    monkeypatch.setattr(tenants, "run_words", lambda command, environ, stdin=b"", timeout_s=15.0:
                        run_words(command, environ, stdin, timeout_s / 15))
    lab.docker.hang("ps")
    lab.local()
    start_s = time.monotonic()

    ran = lab.run("discover")

    assert "docker took longer than 1 s" in ran.stdout and "local" in ran.stdout
    assert time.monotonic() - start_s < 60


def test_another_client_is_used_where_it_is_named(lab: Lab) -> None:
    lab.docker.compose("alice")
    os.rename(lab.docker.bin / "docker", lab.docker.bin / "podman")
    lab.environ["OCP_DOCKER"] = "podman"

    assert lab.names() == ["alice"]


def test_an_output_without_end_of_nesting_is_no_json() -> None:
    assert tenants.Ran(0, b"[" * 100_000, "").json is None


# ---------------------------------------------------------------------------
# Names from outside
# ---------------------------------------------------------------------------

HOSTILE = ("--help", "$(touch x)", "a;touch x", "../../x", "n" * 300, "two\nlines", "\U0001f99e",
           "%n", "", "-")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_label_of_any_form_makes_a_harmless_name(lab: Lab, text: str) -> None:
    lab.docker.add("fine", {"com.docker.compose.service": "openclaw-gateway",
                            "com.docker.compose.project": text})

    [found] = lab.json("discover")["instances"]

    assert tenants.TENANT_NAME.fullmatch(found["name"])
    assert not list(lab.home.rglob("x")) and not Path("x").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_container_whose_name_none_may_have_is_not_listed(lab: Lab, text: str) -> None:
    lab.docker.compose("alice")
    lab.docker.change("alice-openclaw-gateway-1", Name=f"/{text}")

    assert lab.names() == []
    assert all(word != text for call in lab.docker.calls() for word in call)


@pytest.mark.parametrize("text", [each for each in HOSTILE if len(each) < 200])
def test_a_folder_of_any_name_makes_a_harmless_name_or_none(lab: Lab, text: str) -> None:
    lab.local(f".openclaw-{text}".replace("/", "_"))

    found = lab.json("discover")["instances"]

    assert all(tenants.TENANT_NAME.fullmatch(each["name"]) for each in found)
    assert not Path("x").exists() and not list(lab.home.rglob("x"))


@pytest.mark.parametrize("path", ["state", "/a/../../etc", "/a\nb", "/a//b", "-x", ""])
def test_a_state_folder_that_is_no_plain_path_is_not_used(lab: Lab, path: str) -> None:
    lab.docker.compose("alice", env=[f"OPENCLAW_STATE_DIR={path}", f"OPENCLAW_CONFIG_PATH={path}"])

    lab.run("discover")

    copied = {call[-2] for call in lab.docker.calls() if call[0] == "cp"}
    home = os.path.dirname(STATE)
    assert copied == {f"alice-openclaw-gateway-1:{path}" for path in (
        f"{STATE}/openclaw.json", f"{STATE}/skills", f"{STATE}/workspace/skills",
        f"{STATE}/workspace/.agents/skills", f"{home}/.agents/skills")}


@pytest.mark.parametrize("text", ["admin", "local", "42", "Shared", "", "--"])
def test_a_name_that_the_server_gives_to_no_key_is_made_longer(text: str) -> None:
    assert tenants.fitted_name(text).startswith("openclaw-")


@pytest.mark.parametrize("name", ["UPPER", "a_b", "a" * 41, "-a", "a-", "", "../x", "a b"])
def test_a_name_that_no_tenant_may_have_is_refused(lab: Lab, name: str) -> None:
    ran = lab.run("add", "--", name)

    assert ran.code in (2, 1) and "is not a valid tenant name" in ran.stderr


def test_programs_get_no_admin_key_and_no_shell(lab: Lab) -> None:
    world = lab.world()
    secrets = {"OCP_ADMIN_KEY", "OCP_CONNECT_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_API_KEY"}
    world.environ = {**world.environ, **dict.fromkeys(secrets, "x")}

    assert not secrets & set(world.child_environ)
    assert "shell=" not in (REPO / "ocp_tenants.py").read_text()
