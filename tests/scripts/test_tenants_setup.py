"""What `ocp tenants setup`, `apply` and `undo` do to instances: keys, openclaw.json, failures."""

from __future__ import annotations

import json
import ssl
import stat
from pathlib import Path
from typing import Any, Iterator

import pytest

from depth import by_depth
from fake_docker import CONFIG, NODE_UID
from fake_tenants_api import ADMIN, fake_server
from project import REPO
from tenants_lab import Lab, real_docker_lab, tenants, tenants_lab
from tls_files import CERT, write_tls_files

STATE = "home/node/.openclaw"
KEY_FILE = f"{STATE}/ocp-key"
CONFIG_FILE = f"{STATE}/openclaw.json"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tenants_lab(tmp_path) as made:
        yield made


def container(lab: Lab, name: str = "alice", **more: Any) -> Path:
    """A container that reaches the server; the folder of its files."""
    return lab.docker.compose(name, **{"reach": lab.reach(), **more})


def config_of(path: Path) -> Any:
    """The values of an openclaw.json."""
    return tenants.connect_module(str(REPO / "ocp_connect.py")).json_load(path.read_text())


# ---------------------------------------------------------------------------
# Setting up
# ---------------------------------------------------------------------------

def test_a_level_above_api_comes_with_the_way_to_the_instance_and_its_commands(lab: Lab) -> None:
    container(lab)
    local = lab.local()

    assert lab.run("setup", "--yes", "--level", "tools", "--commands", "act").code == 0

    profiles = {name: row["profile"] for name, row in lab.server.tenants.items()}
    assert {(each["level"], each["commands"]) for each in profiles.values()} == {("tools", "act")}
    assert profiles["alice"]["relay"] == {"container": "alice-openclaw-gateway-1"}
    assert profiles["openclaw-local"]["relay"] == {"stateDir": str(local.parent)}
    before = len([call for call in lab.server.calls if call.method in ("PUT", "PATCH")])
    assert lab.run("setup", "--yes", "--level", "tools", "--commands", "act").code == 0
    assert len([call for call in lab.server.calls if call.method in ("PUT", "PATCH")]) == before
    assert lab.run("edit", "alice", "--level", "agent", "--commands", "read").code == 0
    profile = lab.server.tenants["alice"]["profile"]
    assert (profile["level"], profile["commands"]) == ("agent", "read")
    assert profile["relay"] == {"container": "alice-openclaw-gateway-1"}


def test_a_container_gets_a_key_of_its_own_and_the_server(lab: Lab) -> None:
    root = container(lab)

    ran = lab.run("setup", "--yes")

    assert ran.code == 0, ran
    secret = lab.server.keys["alice"]["secret"]
    config = config_of(root / CONFIG_FILE)
    provider = config["models"]["providers"]["claude-local"]
    assert provider["baseUrl"] == f"http://172.17.0.1:{lab.port}/v1"
    assert config["secrets"]["providers"]["ocp"]["path"] == f"/{KEY_FILE}"
    assert (root / KEY_FILE).read_text().strip() == secret
    assert lab.docker.owner("alice-openclaw-gateway-1", f"/{KEY_FILE}") == [
        NODE_UID, NODE_UID, 0o600]
    assert lab.server.tenants["alice"]["profile"]["level"] == "api"
    assert lab.server.keys["alice"]["maxConcurrent"] == 1
    assert 'alice  key made, file changed, validated, answered "pong"' in ran.stdout
    assert "1 tenant set up. Undo: ocp tenants undo" in ran.stdout


def test_comments_order_owner_and_mode_of_a_containers_file_stay(lab: Lab) -> None:
    root = container(lab)
    path = lab.docker.folder / "alice-openclaw-gateway-1"
    (path / "owners.json").write_text(json.dumps({f"/{CONFIG_FILE}": [501, 20, 0o640]}))

    assert lab.run("setup", "--yes").code == 0

    text = (root / CONFIG_FILE).read_text()
    assert "// Made by hand." in text and "// the usual one" in text
    assert text.index("gateway") < text.index("agents") < text.index("claude-local")
    assert lab.docker.owner("alice-openclaw-gateway-1", f"/{CONFIG_FILE}") == [501, 20, 0o640]


def test_a_second_setup_writes_nothing(lab: Lab) -> None:
    container(lab)
    lab.local()
    lab.run("setup", "--yes")
    before, times, calls = lab.everything(), lab.times(), len(lab.server.calls)
    lab.docker.forget_calls()

    ran = lab.run("setup", "--yes")

    assert ran.code == 0 and ran.stdout.count("  as it should be\n") == 2, ran
    assert lab.everything() == before and lab.times() == times
    assert {call.method for call in lab.server.calls[calls:]} == {"GET"}
    assert not [call for call in lab.docker.calls() if call[:3] == ["cp", "--", "-"]]


def test_undo_gives_every_file_back_byte_for_byte(lab: Lab) -> None:
    root, local = container(lab), lab.local(text="{a: 1, // mine\n}\n")
    before = lab.tree_of(root, lab.home)
    lab.run("setup", "--yes")
    assert lab.tree_of(root, lab.home) != before

    planned = lab.json("undo", "--dry-run")["instances"]
    ran = lab.run("undo", "--yes")

    assert ran.code == 0 and lab.tree_of(root, lab.home) == before, ran
    assert [each["name"] for each in planned] == ["alice", "openclaw-local"]
    assert local.read_text() == "{a: 1, // mine\n}\n"
    assert lab.run("undo", "--yes").stdout == "There is nothing to undo.\n"
    assert "alice" in lab.server.keys


def test_undo_takes_only_ours_out_of_a_file_that_was_changed_since(lab: Lab) -> None:
    root, local = container(lab), lab.local()
    lab.run("setup", "--yes")
    for path in (root / CONFIG_FILE, local):
        path.write_text(path.read_text().replace("{", '{\n  "since": true,', 1))

    assert lab.run("undo", "--yes").code == 0

    for path in (root / CONFIG_FILE, local):
        config = config_of(path)
        assert config["since"] is True and "claude-local" not in path.read_text()
    assert "// Made by hand." in (root / CONFIG_FILE).read_text()


def test_after_undo_setup_works_with_the_same_key(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    secret = (root / KEY_FILE).read_text()
    lab.run("undo", "--yes")

    assert lab.run("setup", "--yes").code == 0
    assert (root / KEY_FILE).read_text() == secret


def test_instances_of_a_server_of_https_trust_its_certificate(tmp_path: Path) -> None:
    files = write_tls_files(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files["OCP_TLS_CERT"], files["OCP_TLS_KEY"])
    with tenants_lab(tmp_path, tls=tls) as lab:
        root, local = container(lab), lab.local()

        ran = lab.run("setup", "--yes")

        assert ran.code == 0 and ran.stdout.count('answered "pong"') == 2, ran
        for path, host in ((root / CONFIG_FILE, "172.17.0.1"), (local, "127.0.0.1")):
            provider = config_of(path)["models"]["providers"]["claude-local"]
            assert provider["baseUrl"] == f"https://{host}:{lab.port}/v1"
            assert provider["request"]["tls"]["ca"].strip() == CERT.strip()
        assert lab.run("check").code == 0
        lab.server.fingerprint = "SHA256:" + "A" * 43 + "="
        assert "has the fingerprint" in lab.run("check").stdout
        assert lab.run("undo", "--yes").code == 0
        assert (root / CONFIG_FILE).read_text() == CONFIG



def test_a_local_instance_reads_its_key_from_the_tenants_folder(lab: Lab) -> None:
    local = lab.local(text="{\n  // mine\n}\n")

    ran = lab.run("setup", "--yes")

    config = config_of(local)
    key = Path(config["secrets"]["providers"]["ocp"]["path"])
    assert ran.code == 0 and key == lab.ocp_home / "tenants/openclaw-local/key"
    assert key.read_text().strip() == lab.server.keys["openclaw-local"]["secret"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert "// mine" in local.read_text() and 'answered "pong"' in ran.stdout


def test_two_local_instances_get_two_keys(lab: Lab) -> None:
    paths = [lab.local(), lab.local(".openclaw-work")]

    lab.run("setup", "--yes")

    keys = {Path(config_of(path)["secrets"]["providers"]["ocp"]["path"]).read_text()
            for path in paths}
    assert len(keys) == 2


def test_a_file_that_is_not_there_is_made_and_undo_removes_it(lab: Lab) -> None:
    root = container(lab, config=None)

    assert lab.run("setup", "--yes").code == 0
    assert config_of(root / CONFIG_FILE)["models"]["providers"]["claude-local"]
    assert lab.run("undo", "--yes").code == 0
    assert not list((root / STATE).iterdir())


def test_a_stopped_container_is_set_up_and_it_says_what_is_left(lab: Lab) -> None:
    root = container(lab, is_running=False)

    ran = lab.run("setup", "--yes")

    assert ran.code == 0 and (root / KEY_FILE).exists()
    assert "stopped: the address cannot be tested" in ran.stdout
    assert "start it and run `ocp tenants check alice`" in ran.stdout
    assert config_of(root / CONFIG_FILE)["models"]["providers"]["claude-local"]["baseUrl"] == (
        f"http://172.17.0.1:{lab.port}/v1")
    assert "ocp-key stays there, empty" in lab.run("undo", "--yes").stdout
    assert (root / CONFIG_FILE).read_text() == CONFIG and not (root / KEY_FILE).read_text()


@pytest.mark.parametrize("words", [(), ("alice",)])
def test_a_dry_run_changes_nothing_at_all(lab: Lab, words: tuple[str, ...]) -> None:
    container(lab)
    lab.local()
    before = lab.everything()

    ran = lab.run("setup", "--dry-run", *words)

    assert ran.code == 0 and lab.everything() == before
    assert {call.method for call in lab.server.calls} == {"GET"}
    assert "claude-local" in ran.stdout and ADMIN not in ran.stdout


def test_a_dry_run_shows_of_a_list_of_models_their_names_only(lab: Lab) -> None:
    lab.local()

    shown, told = lab.run("setup", "--dry-run").stdout, lab.json("setup", "--dry-run")

    (diff,) = [each["diff"] for each in told["instances"]]
    assert '"baseUrl"' in shown and '"id": "claude-haiku-5-5"' in shown
    assert "contextWindow" not in shown and "contextWindow" in "".join(diff)
    assert shown.count("models") == 2


def test_a_dry_run_shows_the_beginning_of_a_long_line(lab: Lab) -> None:
    lab.local(text='{"agents": {}}\n')

    shown = lab.run("setup", "--dry-run").stdout

    assert '+{"agents": ' in shown and "characters)" in shown
    assert max(map(len, shown.splitlines())) < 200


def test_a_dry_run_after_a_change_in_the_container_changes_nothing_either(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    (root / CONFIG_FILE).write_text(CONFIG)
    before = lab.everything()

    ran = lab.run("setup", "--dry-run")

    assert "openclaw.json: this server" in ran.stdout and lab.everything() == before


def test_without_a_terminal_and_yes_nothing_is_done(lab: Lab) -> None:
    container(lab)
    before = lab.everything()

    ran = lab.run("setup")

    assert ran.code == 2 and "say --yes" in ran.stderr and lab.everything() == before


def test_only_the_named_instances_are_set_up(lab: Lab) -> None:
    container(lab)
    container(lab, "bob")

    lab.run("setup", "--yes", "bob")

    assert list(lab.server.keys) == ["bob"]
    ran = lab.run("setup", "--yes", "carol")
    assert ran.code == 1 and "There is no instance 'carol' here" in ran.stderr


def test_of_three_instances_a_broken_one_stops_no_other(lab: Lab) -> None:
    container(lab, "alice")
    broken = container(lab, "bob", config="{ broken")
    container(lab, "carol")

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and list(lab.server.keys) == ["alice", "carol"]
    assert "bob    FAILED: openclaw.json" in ran.stdout
    assert "2 tenants set up, 1 failed." in ran.stdout
    assert (broken / CONFIG_FILE).read_text() == "{ broken"
    (broken / CONFIG_FILE).write_text("{}")
    ran = lab.run("setup", "--yes")
    assert ran.code == 0 and "1 tenant set up, 2 were set up before." in ran.stdout


def test_instances_in_doubt_are_left_alone(lab: Lab) -> None:
    container(lab)
    local = lab.local(".openclaw-alice")

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and not lab.server.keys and local.read_text() == "{}\n"
    assert "tell them apart with --container or --local" in ran.stdout


def test_an_instance_that_was_told_apart_is_its_tenants_from_then_on(lab: Lab) -> None:
    container(lab)
    lab.local(".openclaw-alice")

    ran = lab.run("add", "alice", "--container", "alice-openclaw-gateway-1", "--apply", "--yes")

    assert ran.code == 0, ran
    assert "alice  as it should be" in lab.run("check", "alice").stdout


@pytest.mark.parametrize(("role", "place"), [
    ("--primary", {"primary": "claude-local/claude-sonnet-5-5", "fallbacks": []}),
    ("--backup", {"primary": "anthropic/claude-sonnet-5-5",
                  "fallbacks": ["claude-local/claude-sonnet-5-5"]})])
def test_the_place_of_the_server_among_the_models_can_be_chosen(
    lab: Lab, role: str, place: Any
) -> None:
    root = container(lab)

    lab.run("setup", "--yes", role)

    assert config_of(root / CONFIG_FILE)["agents"]["defaults"]["model"] == place


def test_a_provider_of_that_name_that_leads_elsewhere_is_kept(lab: Lab) -> None:
    root = container(lab, config='{models: {providers: {mine: {baseUrl: "http://x:1/v1"}}}}')

    ran = lab.run("setup", "--yes", "--provider-name", "mine")

    assert ran.code == 1 and "choose another name with --provider-name" in ran.stdout
    assert "claude-local" not in (root / CONFIG_FILE).read_text()


# ---------------------------------------------------------------------------
# The address
# ---------------------------------------------------------------------------

def test_the_address_is_the_first_that_leads_to_this_very_server(lab: Lab, tmp_path: Path) -> None:
    other_home = tmp_path / "other"
    other_home.mkdir()
    with fake_server(other_home) as other:
        other.started -= 1000
        root = container(lab, reach={
            **lab.reach(), f"http://host.docker.internal:{lab.port}": other.url})

        assert lab.run("setup", "--yes").code == 0
        assert other.calls and not [call for call in other.calls if call.key]
    assert "172.17.0.1" in (root / CONFIG_FILE).read_text()


def test_a_network_of_compose_has_its_own_gateway(lab: Lab) -> None:
    root = container(lab, reach=lab.reach("172.20.0.1"))
    lab.docker.change("alice-openclaw-gateway-1", NetworkSettings={
        "Networks": {"alice_default": {"Gateway": "172.20.0.1"}}})

    lab.run("setup", "--yes")

    assert f"http://172.20.0.1:{lab.port}/v1" in (root / CONFIG_FILE).read_text()


def test_where_no_address_answers_nothing_is_changed_and_the_setting_is_named(lab: Lab) -> None:
    container(lab, reach={})
    before = lab.everything()

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "Set CLAUDE_BIND to an address that containers reach" in ran.stdout
    assert lab.everything() == before and not lab.server.keys


def test_an_address_that_is_named_is_taken(lab: Lab) -> None:
    root = container(lab, reach={"http://10.0.0.5:9999": lab.server.url})

    assert lab.run("setup", "--yes", "--url", "http://10.0.0.5:9999").code == 0
    assert "http://10.0.0.5:9999/v1" in (root / CONFIG_FILE).read_text()


def test_a_container_in_the_hosts_network_uses_the_address_from_here(lab: Lab) -> None:
    container(lab, reach={lab.server.url: lab.server.url})
    lab.docker.change("alice-openclaw-gateway-1", HostConfig={"NetworkMode": "host"})

    assert lab.run("setup", "--yes").code == 0


def test_a_new_address_replaces_the_old_one(lab: Lab) -> None:
    root = container(lab)
    before = (root / CONFIG_FILE).read_bytes()
    lab.run("setup", "--yes")
    (lab.docker.folder / "alice-openclaw-gateway-1/reach.json").write_text(
        json.dumps(lab.reach("host.docker.internal")))

    assert lab.run("apply", "--yes").code == 0

    text = (root / CONFIG_FILE).read_text()
    assert "host.docker.internal" in text and "172.17.0.1" not in text
    lab.run("undo", "--yes")
    assert (root / CONFIG_FILE).read_bytes() == before


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------

def test_a_key_of_that_name_is_a_devices_until_told_otherwise(lab: Lab) -> None:
    container(lab)
    lab.server.keys["alice"] = {"id": 7, "name": "alice", "secret": "s" * 40}

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "--existing" in ran.stdout
    assert lab.server.keys["alice"]["secret"] == "s" * 40
    assert lab.run("setup", "--yes", "--existing").code == 0
    assert lab.server.keys["alice"]["secret"] != "s" * 40 and lab.server.keys["alice"]["id"] == 7


@pytest.mark.parametrize("loss", ["file", "owner", "mode", "content"])
def test_a_key_in_the_container_that_openclaw_would_refuse_is_written_again(
    lab: Lab, loss: str
) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    place = lab.docker.folder / "alice-openclaw-gateway-1/owners.json"
    owner = {"owner": [0, 0, 0o600], "mode": [NODE_UID, NODE_UID, 0o644]}.get(loss)
    if loss == "file":
        (root / KEY_FILE).unlink()
    elif loss == "content":
        (root / KEY_FILE).write_text("another\n")
    else:
        place.write_text(json.dumps({f"/{KEY_FILE}": owner}))

    ran = lab.run("apply", "--yes")

    assert ran.code == 0 and "its key file" in ran.stdout
    assert (root / KEY_FILE).read_text().strip() == lab.server.keys["alice"]["secret"]
    assert lab.docker.owner("alice-openclaw-gateway-1", f"/{KEY_FILE}")[2] == 0o600
    assert ["exec", "--", "alice-openclaw-gateway-1", "openclaw", "secrets", "reload"] in (
        lab.docker.calls())


def test_a_key_that_was_rotated_elsewhere_gets_a_new_secret(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    lab.server.keys["alice"]["secret"] = "elsewhere" * 5

    assert lab.run("apply", "--yes").code == 0
    assert (root / KEY_FILE).read_text().strip() == lab.server.keys["alice"]["secret"]
    assert lab.server.keys["alice"]["secret"] != "elsewhere" * 5


def test_a_key_that_was_renamed_keeps_its_instance(lab: Lab) -> None:
    container(lab)
    lab.run("setup", "--yes")
    for rows in (lab.server.keys, lab.server.tenants):
        rows["anna"] = {**rows.pop("alice"), "name": "anna"}

    assert "anna  as it should be" in lab.run("check").stdout
    assert "anna  as it should be" in lab.run("setup", "--yes").stdout
    assert list(lab.server.keys) == ["anna"]


def test_a_revoked_key_is_made_anew(lab: Lab) -> None:
    container(lab)
    lab.run("setup", "--yes")
    lab.server.keys.clear()
    lab.server.tenants.clear()

    assert lab.run("setup", "--yes").code == 0
    assert "alice" in lab.server.tenants


def test_a_folder_of_somebody_else_is_used_only_when_told(lab: Lab) -> None:
    container(lab)
    (lab.ocp_home / "tenants/alice/skills").mkdir(parents=True)

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "--adopt uses it" in ran.stdout and not lab.server.keys
    assert lab.run("setup", "--yes", "--adopt").code == 0


@pytest.mark.parametrize("place", [
    "tenants/alice", "tenants/alice/instance", "tenants/alice/connect"])
def test_the_files_of_a_tenant_follow_no_link(lab: Lab, tmp_path: Path, place: str) -> None:
    container(lab)
    outside = tmp_path / "outside"
    outside.mkdir()
    (lab.ocp_home / place).parent.mkdir(parents=True)
    (lab.ocp_home / place).symlink_to(outside)

    ran = lab.run("setup", "--yes", "--adopt")

    assert ran.code == 1 and "is a link" in ran.stdout and not list(outside.iterdir())


@pytest.mark.parametrize("name", ["key", "instance/instance.json", "instance/openclaw.json"])
def test_a_file_of_a_tenant_that_became_a_link_is_replaced_and_not_followed(
    lab: Lab, tmp_path: Path, name: str
) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    path = lab.ocp_home / "tenants/alice" / name
    path.unlink()
    path.symlink_to(outside)
    (root / CONFIG_FILE).write_text(CONFIG)

    said = [lab.run("setup", "--yes"), lab.run("remove", "alice", "--yes", "--purge")]

    assert outside.read_text() == "not ours" and not path.parent.exists()
    assert "not ours" not in "".join(each.stdout + each.stderr for each in said)


def test_no_secret_is_shown_or_given_to_a_program_as_a_word(lab: Lab) -> None:
    container(lab)
    said = [lab.run("setup", "--yes", "--json"), lab.run("list", "--json"), lab.run("check"),
            lab.run("show", "alice"), lab.run("apply", "--dry-run"), lab.run("undo", "--yes")]
    secret = lab.server.keys["alice"]["secret"]

    assert not [ran for ran in said if secret in ran.stdout + ran.stderr]
    assert not [word for call in lab.docker.calls() for word in call
                if secret in word or ADMIN in word]


# ---------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    ("setup", "--yes"), ("undo", "--yes"), ("add", "bob"), ("skills", "pull")])
def test_while_one_run_changes_something_another_is_refused_and_may_look(
    lab: Lab, words: tuple[str, ...]
) -> None:
    container(lab)
    with tenants.exclusive_run(lab.world()):
        ran = lab.run(*words)

        assert ran.code == 1 and "Another `ocp tenants`" in ran.stderr and not lab.server.keys
        assert lab.run("list").code == lab.run("setup", "--dry-run").code == 0
    assert lab.run(*words).code == 0


#: Command lines that only look, for a tenant alice.
LOOKING = (
    ("list",), ("discover",), ("check",), ("show", "alice"), ("env", "alice"), ("gen-key",),
    ("skills", "list"), ("skills", "diff"), ("setup", "--dry-run"), ("apply", "--dry-run"),
    ("undo", "--dry-run"), ("add", "bob", "--dry-run"), ("edit", "alice", "--no-prompt",
                                                        "--dry-run"),
    ("remove", "alice", "--dry-run"), ("env", "alice", "--unset", "A", "--dry-run"),
    ("skills", "pull", "--dry-run"), ("skills", "clean", "--dry-run"))


@pytest.mark.parametrize("words", LOOKING, ids=" ".join)
def test_a_command_that_only_looks_waits_for_nobody_and_writes_nothing(
    lab: Lab, words: tuple[str, ...]
) -> None:
    container(lab)
    lab.run("setup", "--yes")
    with tenants.exclusive_run(lab.world()):
        before = lab.everything()

        ran = lab.run(*words)

        assert ran.code == 0 and lab.everything() == before, ran


@pytest.mark.parametrize("words", [("setup", "--yes"), ("add", "alice")])
def test_a_disk_that_is_full_at_the_first_step_leaves_nothing_that_stops_the_next_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    container(lab)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tenants, "move_below", full)
        assert lab.run(*words).code == 1
    assert list((lab.ocp_home / "tenants/alice").rglob(f"*{tenants.DRAFT}"))

    assert lab.run(*words).code == 0 and "alice" in lab.server.keys


def test_a_full_disk_stops_one_instance_and_no_other(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    container(lab)
    container(lab, "bob")
    copy = tenants.planning_copy

    def full(folder: Any, *more: Any) -> Any:
        if folder.name == "alice":
            raise OSError(28, "No space left on device")
        return copy(folder, *more)

    monkeypatch.setattr(tenants, "planning_copy", full)

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "alice  FAILED: No space left on device" in ran.stdout
    assert list(lab.server.keys) == ["bob"]


def test_a_place_that_is_written_down_in_part_is_given_back_as_far_as_it_is_known(
    lab: Lab
) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    path = lab.ocp_home / "tenants/alice/instance/instance.json"
    path.write_text(json.dumps({"kind": "container", "where": "alice-openclaw-gateway-1"}))

    assert lab.run("undo", "--yes").code == 0
    assert (root / CONFIG_FILE).read_text() == CONFIG


def works_as_before(lab: Lab, root: Path, config: bytes) -> bool:
    """Whether an instance has its old file, and no draft is left."""
    names = {path.name for path in (root / STATE).iterdir()}
    return (root / CONFIG_FILE).read_bytes() == config and names <= {"openclaw.json", "ocp-key"}


@pytest.mark.parametrize("pattern", ["^cp .*- .*", "mv -T", "mv -T.*ocp-key"])
def test_a_file_that_cannot_be_written_stays(lab: Lab, pattern: str) -> None:
    root = container(lab)
    lab.docker.fail((pattern, 1, "no space left on device"))

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "no space left on device" in ran.stdout
    assert (root / CONFIG_FILE).read_text() == CONFIG
    lab.docker.fail()
    assert lab.run("setup", "--yes").code == 0


def test_a_file_that_openclaw_refuses_is_put_back(lab: Lab) -> None:
    root = container(lab)
    (lab.docker.folder / "alice-openclaw-gateway-1/invalid").write_text("models: too many")

    ran = lab.run("setup", "--yes")

    assert ran.code == 1
    assert "does not accept the change, which was undone: models: too many" in ran.stdout
    assert works_as_before(lab, root, CONFIG.encode())
    (lab.docker.folder / "alice-openclaw-gateway-1/invalid").unlink()
    assert lab.run("setup", "--yes").code == 0
    lab.run("undo", "--yes")
    assert (root / CONFIG_FILE).read_text() == CONFIG


@pytest.mark.parametrize(("times", "code"), [(1, 0), (2, 0), (9, 1)])
def test_a_file_that_changes_meanwhile_is_planned_again_three_times(
    lab: Lab, times: int, code: int
) -> None:
    root = container(lab)
    lab.docker.change_before("^cp -- -.*openclaw$", root / CONFIG_FILE, "{n: TIMES}", times)

    ran = lab.run("setup", "--yes")

    assert ran.code == code, ran
    config = config_of(root / CONFIG_FILE)
    assert "n" in config and ("models" in config) is (code == 0)
    assert code == 0 or "another program kept changing" in ran.stdout


@pytest.mark.parametrize("route", [
    "POST /api/keys", "PUT .*/tenant", "POST /v1/chat/completions"])
def test_a_server_that_refuses_a_step_leaves_an_instance_that_the_next_run_heals(
    lab: Lab, route: str
) -> None:
    root = container(lab)
    lab.server.fail[route] = 1

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "made to fail" in ran.stdout
    assert route.endswith("completions") or works_as_before(lab, root, CONFIG.encode())
    assert lab.run("setup", "--yes").code == 0
    assert lab.run("check").code == 0


def test_a_rotation_that_fails_leaves_the_instance_as_it_was(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    before = lab.tree_of(root)
    lab.server.keys["alice"]["secret"] = "elsewhere" * 5
    lab.server.fail["POST .*/rotate"] = 1

    assert lab.run("apply", "--yes").code == 1
    assert lab.tree_of(root) == before


@pytest.mark.parametrize(("mode", "words"), [
    ("none", "set CLAUDE_AUTH_MODE=multi"), ("shared", "set CLAUDE_AUTH_MODE=multi")])
def test_a_server_in_another_mode_is_refused_first(lab: Lab, mode: str, words: str) -> None:
    container(lab)
    lab.server.mode = mode

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and words in ran.stderr and not lab.docker.calls()


def test_a_demo_is_refused_before_anything_is_changed(lab: Lab) -> None:
    lab.local()
    lab.server.is_demo = True
    before = lab.tree_of(lab.home, lab.ocp_home)

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "is a demo, which has no tenants" in ran.stderr
    assert lab.tree_of(lab.home, lab.ocp_home) == before and not lab.server.keys


def test_a_server_without_tenants_is_to_be_updated(lab: Lab) -> None:
    lab.server.has_tenants = False

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "does not support tenants: update it" in ran.stderr


def test_a_server_that_is_not_there_and_a_wrong_key_have_their_codes(lab: Lab) -> None:
    lab.environ["OCP_ADMIN_KEY"] = "wrong"
    assert lab.run("setup", "--yes").code == 4
    lab.environ["OCP_URL"] = "http://127.0.0.1:1"
    assert lab.run("setup", "--yes").code == 3


def test_the_admin_key_of_the_services_settings_is_used(lab: Lab) -> None:
    del lab.environ["OCP_ADMIN_KEY"]
    settings = lab.ocp_home / "ocp.env"
    settings.write_text(f"OCP_ADMIN_KEY='{ADMIN}'\n")
    (lab.ocp_home / "install.json").write_text(json.dumps({
        "version": 1, "actions": [], "url": lab.server.url, "data_dir": str(lab.ocp_home),
        "env_file": str(settings)}))

    assert lab.run("list").code == 0
    settings.write_text("")
    (lab.ocp_home / "admin-key").write_text(f"{ADMIN}\n")
    assert lab.run("list").code == 0


def test_a_missing_admin_key_is_told_with_the_place_where_it_was_looked_for(lab: Lab) -> None:
    lab.environ["OCP_ADMIN_KEY"] = "wrong"
    assert "that was sent is not this server's" in lab.run("list").stderr
    del lab.environ["OCP_ADMIN_KEY"]

    ran = lab.run("list")

    assert ran.code == 4
    assert f"there is none to read in {lab.ocp_home / 'admin-key'}." in ran.stderr


def test_a_folder_of_tenants_that_cannot_be_made_is_named(lab: Lab) -> None:
    (lab.ocp_home / "tenants").write_text("in the way")

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and f"{lab.ocp_home / 'tenants'} cannot be used: " in ran.stderr, ran
    assert lab.run("list").code == 0


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda path: path.write_text("{ a: "), "openclaw.json"),
    (lambda path: path.write_text('{$include: "./other.json"}'), "$include"),
    (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "is a link")])
def test_a_file_that_cannot_be_changed_safely_is_left_alone(
    lab: Lab, break_it: Any, reason: str
) -> None:
    root = container(lab)
    break_it(root / CONFIG_FILE)
    before = lab.tree_of(root)

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and reason in ran.stdout, ran
    assert lab.tree_of(root) == before and not lab.server.keys


def test_a_container_that_forbids_writes_to_its_file_is_left_alone(lab: Lab) -> None:
    container(lab, env=["OPENCLAW_CONFIG_READONLY=1"])

    assert "OPENCLAW_CONFIG_READONLY is set" in lab.run("setup", "--yes").stdout


def test_undo_says_what_it_cannot_reach_and_goes_on_with_the_others(lab: Lab) -> None:
    container(lab)
    local = lab.local()
    lab.run("setup", "--yes")
    lab.docker.remove("alice-openclaw-gateway-1")

    ran = lab.run("undo", "--yes")

    assert ran.code == 1
    assert "FAILED: its container alice-openclaw-gateway-1 is gone" in ran.stdout
    assert local.read_text() == "{}\n"


@pytest.mark.parametrize("words", [
    ("apply", "--yes"), ("apply", "alice", "--yes"), ("check",), ("skills", "pull"),
    ("skills", "diff", "alice"), ("setup", "--yes")])
def test_a_tenant_whose_container_cannot_be_looked_at_has_failed_and_no_other(
    lab: Lab, words: tuple[str, ...]
) -> None:
    container(lab)
    lab.local()
    lab.run("setup", "--yes")
    lab.docker.fail(("^ps", 1, "Cannot connect to the Docker daemon at unix:///x."))

    ran = lab.run(*words)

    assert ran.code == 1 and ran.stdout.count("FAILED") == 1, ran
    assert "alice-openclaw-gateway-1 cannot be looked at: Cannot connect to the" in ran.stdout
    assert ("openclaw-local" in ran.stdout) is ("alice" not in words)


@pytest.mark.parametrize("words", [
    ("setup", "--yes"), ("apply", "--yes"), ("check",), ("skills", "list"), ("import", "c.yaml")])
def test_docker_that_is_not_there_is_not_told_where_no_tenant_has_a_container(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(lab.home)
    Path("c.yaml").write_text("tenants: []\n")
    lab.local()
    lab.environ["PATH"] = str(lab.home)
    lab.run("setup", "--yes")

    ran = lab.run(*words)

    assert ran.code == 0 and "docker" not in ran.stdout + ran.stderr, ran


def test_docker_that_is_not_there_is_told_where_an_instance_is_looked_for(lab: Lab) -> None:
    lab.environ["PATH"] = str(lab.home)
    lab.run("add", "alice")

    ran = lab.run("apply", "alice", "--yes")

    assert ran.code == 1 and "not listed: there is no program docker. For an" in ran.stderr


def test_setup_says_that_containers_are_not_touched_if_docker_is_there_and_fails(lab: Lab) -> None:
    lab.local()
    lab.docker.fail(("^ps", 1, "permission denied"))

    ran = lab.run("setup", "--yes")

    assert ran.code == 0 and "Containers are not touched: permission denied" in ran.stdout


def test_undo_finds_a_container_that_was_renamed(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    lab.docker.change("alice-openclaw-gateway-1", Name="/other")

    assert lab.run("undo", "--yes").code == 0
    assert (root / CONFIG_FILE).read_text() == CONFIG


def test_an_instance_elsewhere_is_found_again_after_undo_and_missed_when_it_is_gone(
    lab: Lab, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    added = lab.run("add", "anna", "--apply", "--local", str(folder), "--yes")
    assert added.code == 0 and (folder / "openclaw.json").exists(), added
    assert lab.run("undo", "--yes").code == 0 and not (folder / "openclaw.json").exists()

    assert lab.run("apply", "anna", "--yes").code == 0
    assert lab.run("check").code == 0 and (folder / "openclaw.json").exists()
    folder.rename(tmp_path / "moved")

    checked = lab.json("check")["instances"]
    assert lab.run("check").code == 1
    assert [(each["name"], each["ok"], each["problem"]) for each in checked] == [
        ("anna", False, f"{folder} was not found")]


def test_undo_leaves_no_draft_of_a_run_that_was_killed(lab: Lab) -> None:
    local = lab.local()
    before = lab.tree_of(lab.home)
    lab.run("setup", "--yes")
    local.with_name(f"openclaw.json{tenants.DRAFT}").write_text("{")

    assert lab.run("undo", "--yes").code == 0 and lab.tree_of(lab.home) == before


def test_a_running_gateway_of_a_folder_is_to_read_its_new_key(lab: Lab) -> None:
    lab.local()
    assert "secrets reload" not in lab.run("setup", "--yes").stdout
    lab.server.keys["openclaw-local"]["secret"] = "x" * 40

    assert "run `openclaw secrets reload` so that" in lab.run("apply", "--yes").stdout


def test_undo_needs_no_server(lab: Lab) -> None:
    root = container(lab)
    lab.run("setup", "--yes")
    lab.environ["OCP_URL"] = "http://127.0.0.1:1"

    assert lab.run("undo", "--yes").code == 0
    assert (root / CONFIG_FILE).read_text() == CONFIG


def test_without_ocp_connect_it_says_what_is_missing(lab: Lab, tmp_path: Path) -> None:
    container(lab)
    lab.tree = str(tmp_path)

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "Copy ocp_connect.py from the server's checkout" in ran.stdout
    assert not lab.server.keys


class Killed(BaseException):
    """The program ends here, as by SIGKILL: nothing is tidied up by an `except Exception`."""


def killing(lab: Lab, patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Let the program end at its n-th step: a program started, a request sent, a file written or
    renamed. Returns the list that grows by each step."""
    steps: list[int] = []

    def counted(original: Any) -> Any:
        def do(*args: Any, **more: Any) -> Any:
            steps.append(len(steps))
            if len(steps) > at:
                raise Killed
            return original(*args, **more)
        return do

    for name in ("Running", "http_json", "write_whole", "write_below", "move_below"):
        patch.setattr(tenants, name, counted(getattr(tenants, name)))
    return steps


def run_killed(lab: Lab, at: int, *words: str) -> bool:
    """Run a command that ends at its n-th step; whether it came to that."""
    with pytest.MonkeyPatch.context() as patch:
        killing(lab, patch, at)
        try:
            lab.run(*words)
        except Killed:
            return True
    return False


def test_after_an_end_at_any_step_of_setup_the_next_one_heals_and_undo_gives_back(
    lab: Lab
) -> None:
    root, local = container(lab), lab.local(text="{a: 1, // mine\n}\n")
    before = lab.tree_of(root, lab.home)
    for number, at in enumerate(range(0, 300, by_depth(13, 6, 1))):
        was_killed = run_killed(lab, at, "setup", "--yes")
        if number % 2:
            assert lab.run("setup", "--yes").code == 0, at
            assert lab.run("check").code == 0, at
        lab.run("undo", "--yes")
        assert lab.tree_of(root, lab.home) == before, at
        if not was_killed:
            break
    assert local.exists()


def test_after_an_end_at_any_step_of_undo_the_next_one_gives_back(lab: Lab) -> None:
    root = container(lab)
    before = lab.tree_of(root)
    for at in range(0, 60, by_depth(5, 2, 1)):
        assert lab.run("setup", "--yes", "--skip-answer").code == 0
        was_killed = run_killed(lab, at, "undo", "--yes")
        assert lab.run("undo", "--yes").code == 0, at
        assert lab.tree_of(root) == before, at
        if not was_killed:
            break


@pytest.mark.exhaustive
def test_the_real_docker_client_does_the_same_over_a_stand_in_for_its_daemon(
    tmp_path: Path
) -> None:
    with real_docker_lab(tmp_path) as lab:
        root = container(lab)
        missing = container(lab, "bob", config=None, is_running=False)

        ran = lab.run("setup", "--yes")

        assert ran.code == 0, ran
        assert 'key made, file changed, validated, answered "pong"' in ran.stdout
        assert "start it and run `ocp tenants check bob`" in ran.stdout
        assert (root / KEY_FILE).read_text().strip() == lab.server.keys["alice"]["secret"]
        assert config_of(missing / CONFIG_FILE)["models"]["providers"]["claude-local"]
        assert lab.run("check").code == 0
        assert lab.run("undo", "--yes", "alice").code == 0
        assert (root / CONFIG_FILE).read_text() == CONFIG and not (root / KEY_FILE).exists()


@pytest.mark.exhaustive
def test_the_programs_themselves_do_the_same_as_in_one_process(tmp_path: Path) -> None:
    ends = []
    for quick in (True, False):
        folder = tmp_path / str(quick)
        folder.mkdir()
        with tenants_lab(folder, quick) as lab:
            root = container(lab)
            lab.run("setup", "--yes")
            text = (root / CONFIG_FILE).read_text().replace(str(lab.port), "PORT")
            calls = [call[0] for call in lab.docker.calls()]
            assert lab.run("undo", "--yes").code == 0
            ends.append((text, calls, (root / CONFIG_FILE).read_text()))

    assert ends[0] == ends[1] and ends[0][2] == CONFIG
