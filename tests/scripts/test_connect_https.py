"""ocp_connect.py and servers with a certificate of their own: whom it trusts, what tools get."""
from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from connect_home import KEY, SERVER, Home
from forks import forker
from ocp_command import ocp_env, run_env
from processes import Ran
from project import REPO, clean_env, load_script
from server import Server, running_server
from tls_files import CERT

connect, ocp = load_script("ocp_connect"), load_script("ocp")
Json = Any
SECURE = SERVER._replace(url="https://192.0.2.7:3456", certificate=CERT)
SYSTEM = CERT.replace("MIIB", "MIIC")


class Secure(NamedTuple):
    """A server with the certificate that `ocp tls` made, in a home that is the operator's."""
    server: Server
    home: Path
    fingerprint: str

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.port}"


def made_certificate(home: Path, *words: str) -> Json:
    """What `ocp tls` says that it made in a home."""
    ran = run_env(ocp_env(home, "tls", "--json", *words, addresses=lambda: []))
    assert ran.code == 0, ran
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    home = tmp_path_factory.mktemp("operator")
    made = made_certificate(home)
    settings = {"OCP_TLS_CERT": made["certificate"], "OCP_TLS_KEY": made["key"]}
    with running_server(tmp_path_factory.mktemp("server"), env=settings) as server:
        yield Secure(server, home, made["fingerprint"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    bundle = tmp_path / "system.pem"
    bundle.write_text(f"# Système\n{SYSTEM}")
    monkeypatch.setattr(connect, "SYSTEM_BUNDLES", ("/nowhere.pem", str(bundle)))
    return Home(tmp_path / "home")


def connected(folder: Path, *words: str, **env: str) -> Ran:
    """ocp_connect.py with these words, in this home, without a terminal."""
    return forker(REPO / "ocp_connect.py").run(
        words, clean_env(HOME=str(folder), SHELL="/bin/bash", **env), folder, 300)


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------
# Whom it trusts
# ---------------------------------------------------------------------------

def test_a_server_is_known_by_its_fingerprint_and_later_without_it(
    secure: Secure, tmp_path: Path
) -> None:
    first = connected(tmp_path, secure.url, "--fingerprint", secure.fingerprint, "--only", "codex",
                      "--yes")
    assert first.code == 0 and "answers: You said" in first.stdout, first
    saved = tmp_path / ".config/ocp/server.pem"
    assert saved.stat().st_mode & 0o777 == 0o644
    assert saved.read_bytes().strip() == Path(
        secure.home / ".ocp/tls/cert.pem").read_bytes().strip()

    again = connected(tmp_path, secure.url, "--only", "codex", "--yes")
    assert again.code == 0 and "Everything is up to date" in again.stdout, again

    undone = connected(tmp_path, "undo", "--yes")
    assert undone.code == 0 and left(tmp_path) == []


def test_another_key_is_refused_and_nothing_is_sent_or_written(
    secure: Secure, tmp_path: Path
) -> None:
    other = "SHA256:" + "A" * 43 + "="

    ran = connected(tmp_path, secure.url, "--fingerprint", other, "--key", KEY, "--yes")

    assert ran.code == 1 and secure.fingerprint in ran.stderr and "Nothing was sent" in ran.stderr
    assert left(tmp_path) == [] and KEY not in ran.stdout + ran.stderr


def test_an_address_of_http_of_a_server_of_https_is_told(secure: Secure, tmp_path: Path) -> None:
    ran = connected(tmp_path, secure.url.replace("https://", "http://"), "--dry-run")
    assert ran.code == connect.Exit.UNREACHABLE and "speaks https" in ran.stderr, ran
    assert "`ocp lan`" in ran.stderr and "not an OCP server" not in ran.stderr


def test_without_a_fingerprint_the_command_that_has_it_is_named(
    secure: Secure, tmp_path: Path
) -> None:
    ran = connected(tmp_path, secure.url, "--yes")

    assert ran.code == 3 and "ocp tls --show" in ran.stderr and left(tmp_path) == []


@pytest.mark.parametrize("reason", ["IP address mismatch, certificate is not valid for 'x.lan'",
                                    "Hostname mismatch, certificate is not valid for 'x.lan'"])
def test_a_host_that_the_certificate_does_not_name_is_told_the_operator(reason: str) -> None:
    assert "ocp tls --name x.lan" in str(connect.untrusted("https://x.lan:1", reason, CERT))
    expired = str(connect.untrusted("https://x.lan:1", "certificate has expired", CERT))
    assert "certificate has expired" in expired and expired.endswith("run `ocp tls`.")


@pytest.mark.parametrize("text", ["", "SHA256:", "SHA1:" + "A" * 43, "SHA256:" + "A" * 42,
                                  "SHA256:" + "!" * 43])
def test_what_is_no_fingerprint_is_wrong_usage(tmp_path: Path, text: str) -> None:
    ran = connected(tmp_path, "https://127.0.0.1:1", "--fingerprint", text, "--yes")

    assert ran.code == 2 and "ocp tls --show" in ran.stderr


def test_a_fingerprint_for_http_is_wrong_usage(tmp_path: Path) -> None:
    ran = connected(tmp_path, "127.0.0.1", "--fingerprint", "SHA256:" + "A" * 43, "--yes")

    assert ran.code == 2 and "https://" in ran.stderr


def test_a_renewed_certificate_of_the_same_key_takes_the_place_of_the_old_one(
    tmp_path: Path
) -> None:
    operator, device = tmp_path / "operator", tmp_path / "device"
    operator.mkdir()
    device.mkdir()
    port = "0"
    for name, more in (("", ["--fingerprint"]), ("box.home", [])):
        made = made_certificate(operator, *(["--name", name] if name else []))
        assert made["made"] is True
        settings = {"OCP_TLS_CERT": made["certificate"], "OCP_TLS_KEY": made["key"],
                    "CLAUDE_PROXY_PORT": port}
        with running_server(tmp_path / f"server{name}", env=settings) as server:
            port = str(server.port)
            more += [made["fingerprint"]] if more else []
            ran = connected(
                device, f"https://127.0.0.1:{port}", *more, "--only", "llm", "--yes")
            assert ran.code == 0, ran
    saved = (device / ".config/ocp/server.pem").read_text()
    assert "box.home" in ocp.certificate_of(ssl.PEM_cert_to_DER_cert(saved)).names


# ---------------------------------------------------------------------------
# The command for a device
# ---------------------------------------------------------------------------

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="no curl: apt-get install curl")


def device_command(secure: Secure) -> str:
    return str(ocp.connect_line(secure.url, secure.fingerprint)).replace("python3", sys.executable)


def in_bash(home: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=clean_env(HOME=str(home)),
        capture_output=True, text=True, timeout=300, start_new_session=True)


@needs_curl
def test_one_command_downloads_the_script_from_the_pinned_server_and_connects(
    secure: Secure, tmp_path: Path
) -> None:
    done = in_bash(tmp_path, device_command(secure) + " --only codex --yes")

    assert done.returncode == 0 and "answers: You said" in done.stdout, done


@needs_curl
def test_the_command_downloads_nothing_from_a_server_with_another_key(
    secure: Secure, tmp_path: Path
) -> None:
    wrong = secure.fingerprint[7:]
    command = device_command(secure).replace(f"sha256//{wrong}", "sha256//" + "A" * 43 + "=")

    done = in_bash(tmp_path, command + " --only codex --yes")

    assert done.returncode == 90 and left(tmp_path) == [], done


def test_a_certificate_of_an_authority_needs_no_pin(secure: Secure) -> None:
    assert ocp.pin_of(secure.url) == secure.fingerprint
    assert ocp.pin_of("http://127.0.0.1:1") == "" == ocp.pin_of("https://127.0.0.1:1")


# ---------------------------------------------------------------------------
# What tools get
# ---------------------------------------------------------------------------

def env_lines(home: Home) -> list[str]:
    return (home.folder / ".config/ocp/env.sh").read_text().splitlines()


OWN_SETTING = {
    "continue": (".continue/config.yaml", "caBundlePath"),
    "claude-code": (".claude/settings.json", "NODE_EXTRA_CA_CERTS"),
    "openclaw": (".openclaw/openclaw.json", "BEGIN CERTIFICATE"),
}


@pytest.mark.parametrize("tool", sorted(OWN_SETTING))
def test_a_tool_with_a_setting_of_its_own_gets_that_and_no_shell_is_changed(
    home: Home, tool: str
) -> None:
    path, word = OWN_SETTING[tool]

    home.connect(tool, server=SECURE)

    assert word in (home.folder / path).read_text()
    assert not (home.folder / ".bashrc").exists()
    home.undo()
    assert home.files() == {}


@pytest.mark.parametrize("tool", ["codex", "opencode", "llm", "aider", "cline", "zed"])
def test_a_tool_without_one_finds_the_certificate_by_variables(home: Home, tool: str) -> None:
    home.put(".bashrc", "# mine\n")

    home.connect(tool, server=SECURE)

    state = home.folder / ".config/ocp"
    assert env_lines(home)[1:-1] == [
        f"export NODE_EXTRA_CA_CERTS={state}/server.pem",
        f"export SSL_CERT_FILE={state}/ca-bundle.pem"]
    assert (state / "ca-bundle.pem").read_text() == SYSTEM + CERT
    assert home.plan(tool, server=SECURE).is_empty
    home.undo()
    assert home.files() == {".bashrc": b"# mine\n"}


def test_shells_that_have_more_keep_it_when_another_tool_is_connected(home: Home) -> None:
    home.connect("shell", server=SECURE)
    before = env_lines(home)
    assert len(before) == 2 + len(connect.VARIABLES) + 2

    home.connect("codex", server=SECURE)

    assert env_lines(home) == before


def test_a_file_of_certificates_of_the_users_is_kept_and_said(home: Home) -> None:
    home.put(".bashrc", "export NODE_EXTRA_CA_CERTS=/corp/node.pem\n")
    home.machine = connect.dataclasses.replace(
        home.machine, environ={**home.machine.environ, "SSL_CERT_FILE": "/corp/ca.pem"})

    plan = home.connect("codex", "claude-code", server=SECURE)

    assert not (home.folder / ".config/ocp/env.sh").exists()
    hints = "\n".join(plan.hints)
    assert f"cat {home.folder}/.config/ocp/server.pem >> /corp/ca.pem" in hints
    assert "NODE_EXTRA_CA_CERTS (line 1 of ~/.bashrc) is kept" in hints


def test_claude_codes_own_file_of_certificates_is_kept(home: Home) -> None:
    home.put(".claude/settings.json", '{"env": {"NODE_EXTRA_CA_CERTS": "/corp.pem"}}\n')

    home.connect("claude-code", server=SECURE)

    text = (home.folder / ".claude/settings.json").read_text()
    assert "/corp.pem" in text and "server.pem" not in text


def test_where_the_systems_certificates_are_not_found_none_are_hidden(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "SYSTEM_BUNDLES", ("/nowhere.pem",))

    plan = home.connect("codex", server=SECURE)

    assert not [line for line in env_lines(home) if "SSL_CERT_FILE" in line]
    assert any("were not found" in hint for hint in plan.hints)


def test_a_server_of_http_brings_none_of_this(home: Home) -> None:
    home.connect("codex", "continue", "claude-code", "shell")

    assert "server.pem" not in "".join(
        content.decode() for name, content in home.files().items() if "connect.json" not in name)


def test_this_systems_certificates_are_found_here() -> None:
    found = connect.system_certificates()
    if not found:
        pytest.skip("this machine has no list of authorities")
    assert ssl.create_default_context(cadata=found).cert_store_stats()["x509"]

