"""`ocp tls`: the certificate that it makes, what it tells the server, and who looks at it."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clock import SkippingClock
from ocp_command import DEAD_URL, Programs, ocp, ocp_env, run_env, stub_server, write_record
from processes import Ran
from server import running_server
from tls_files import CERT, write_tls_files

Json = Any
DAY_S = 86_400.0
pytestmark = pytest.mark.skipif(
    not shutil.which("openssl"), reason="no openssl: apt-get install openssl")


def tls(home: Path, *words: str, **more: Any) -> Ran:
    """`ocp tls` in a home, on a machine with one address."""
    return run_env(ocp_env(home, "tls", *words, **{"addresses": lambda: ["192.0.2.7"], **more}))


def made(home: Path, *words: str, **more: Any) -> Json:
    ran = tls(home, *words, "--json", **more)
    assert ran.code == 0, ran
    return json.loads(ran.stdout)


def cert_path(home: Path) -> Path:
    return home / ".ocp/tls/cert.pem"


# ---------------------------------------------------------------------------
# The certificate
# ---------------------------------------------------------------------------

def test_a_certificate_is_made_for_every_name_of_this_machine(tmp_path: Path) -> None:
    found = made(tmp_path, "--name", "Box.Home.", "--name", "10.9.8.7", "--name", "fd00::0:1")

    host = socket.gethostname().lower()
    assert set(found["names"]) >= {
        "localhost", "127.0.0.1", "::1", host, f"{host.partition('.')[0]}.local", "192.0.2.7",
        "box.home", "10.9.8.7", "fd00::1"}
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", found["certificate"]],
        capture_output=True, text=True, check=True).stdout
    assert "CA:FALSE" in text and "TLS Web Server Authentication" in text
    # With keyUsage a client that is built with BoringSSL would not trust it.
    assert "Key Usage: critical" not in text
    key = Path(found["key"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in key.parent.parent.iterdir()) == ["tls"]
    certificate = ocp.read_certificate(found["certificate"])
    assert certificate.is_self_signed and not certificate.is_authority
    days = (certificate.expires_s - ocp.time.time()) / DAY_S
    assert 800 < days < 825, "programs of Apple take 825 days at most"


def test_the_fingerprint_is_that_of_curl_and_openssl(tmp_path: Path) -> None:
    found = made(tmp_path)

    public = subprocess.run(["openssl", "pkey", "-in", found["key"], "-pubout", "-outform", "der"],
                            capture_output=True, check=True).stdout
    digest = ocp.base64.b64encode(ocp.hashlib.sha256(public).digest()).decode()
    assert found["fingerprint"] == f"SHA256:{digest}"


def test_a_certificate_in_order_stays_as_it_is(tmp_path: Path) -> None:
    first = made(tmp_path, "--name", "box.home")
    before = cert_path(tmp_path).read_bytes()

    again = made(tmp_path)

    assert first["made"] and not again["made"] and cert_path(tmp_path).read_bytes() == before


def test_a_certificate_whose_key_is_another_one_is_made_again(tmp_path: Path) -> None:
    first = made(tmp_path)
    other = made(tmp_path / "other")
    Path(first["key"]).write_bytes(Path(other["key"]).read_bytes())

    again = made(tmp_path)

    assert again["made"] and again["fingerprint"] == other["fingerprint"]
    assert ocp.is_pair(ocp.TlsFiles(again["certificate"], again["key"]))


@pytest.mark.parametrize("reason", ["a new address", "a new name", "soon expired"])
def test_a_certificate_is_made_again_with_the_same_key(tmp_path: Path, reason: str) -> None:
    first = made(tmp_path, "--name", "box.home")
    clock = SkippingClock()
    clock.ahead_s = 780 * DAY_S if reason == "soon expired" else 0
    more = {"addresses": lambda: ["192.0.2.8"]} if reason == "a new address" else {}
    words = ["--name", "other.home"] if reason == "a new name" else []

    again = made(tmp_path, *words, clock=clock, **more)

    assert again["made"] and again["fingerprint"] == first["fingerprint"]
    assert set(first["names"]) <= set(again["names"])


def test_without_openssl_it_says_how_to_get_it(tmp_path: Path) -> None:
    ran = tls(tmp_path, environ={"PATH": str(tmp_path / "empty")})

    assert ran.code == 1 and "apt-get install openssl" in ran.stderr
    assert not (tmp_path / ".ocp/tls").exists()


#: What an openssl may do that does not do what it is asked for.
BAD_OPENSSL = {
    "fails": ('echo "unknown option -x509" >&2; exit 1', "unknown option"),
    "writes nothing": ("exit 0", "too old"),
    "writes no certificate": (
        'while [ $# -gt 0 ]; do [ "$1" = -out ] && echo x > "$2"; shift; done', ""),
}


@pytest.mark.parametrize("how", sorted(BAD_OPENSSL))
def test_an_openssl_that_does_not_make_it_leaves_everything_as_it_was(
    tmp_path: Path, how: str
) -> None:
    made(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / ".ocp/tls").iterdir()}
    programs = Programs(tmp_path / "bin")
    script, said = BAD_OPENSSL[how]
    programs.add("openssl", script)

    ran = tls(tmp_path, "--name", "new.home", environ={"PATH": programs.path})

    assert ran.code == 1 and said in ran.stderr, ran
    assert {path: path.read_bytes() for path in (tmp_path / ".ocp/tls").iterdir()} == before
    assert [path.name for path in (tmp_path / ".ocp").iterdir()] == ["tls"]


def test_an_openssl_without_what_is_asked_for_is_too_old(tmp_path: Path) -> None:
    """It is judged by what it makes: LibreSSL and OpenSSL count their versions differently."""
    programs = Programs(tmp_path / "bin")
    real = shutil.which("openssl")
    programs.add("openssl", f'[ "$1" = req ] || exec {real} "$@"\n'
                            f'exec {real} req -x509 -new -key "$6" -subj /CN=x -out "${{12}}"')

    ran = tls(tmp_path, environ={"PATH": programs.path})

    assert ran.code == 1 and "too old" in ran.stderr and "LibreSSL" in ran.stderr, ran
    assert not (tmp_path / ".ocp/tls").exists()


@pytest.mark.parametrize("name", ["a b", "", "a..b", "-x", "x\nIP.9 = 1.2.3.4", "über.lan"])
def test_what_is_no_name_is_wrong_usage(tmp_path: Path, name: str) -> None:
    ran = tls(tmp_path, f"--name={name}")

    assert ran.code == 2 and "--name" in ran.stderr and not cert_path(tmp_path).exists()


@pytest.mark.parametrize("output", [
    "2: eth0    inet 192.0.2.9/24 brd 192.0.2.255 scope global eth0\n1: lo inet 127.0.0.1/8",
    "en0: flags=8863\n\tinet 192.0.2.9 netmask 0xffffff00\n\tinet6 fe80::1%en0\n"
    "en1:\n\tinet 169.254.3.4 netmask 0xffff0000\n"])
def test_the_addresses_of_all_interfaces_are_found(tmp_path: Path, output: str) -> None:
    programs = Programs(tmp_path / "bin")
    (tmp_path / "said").write_text(output)
    programs.add("ip", f"cat {tmp_path}/said" if "eth0" in output else "exit 1")
    programs.add("ifconfig", f"cat {tmp_path}/said")
    env = ocp_env(tmp_path, environ={"PATH": programs.path}, addresses=lambda: ["192.0.2.7"])

    assert ocp.interface_addresses(env) == ["192.0.2.7", "192.0.2.9"]


@pytest.mark.parametrize("text", [b"", b"x", b"\x30\x03abc", b"\x30\x82\xff", bytes(200)])
def test_what_is_no_certificate_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        ocp.certificate_of(text)


def test_a_certificate_of_an_authority_is_told_from_ours() -> None:
    found = ocp.certificate_of(ssl.PEM_cert_to_DER_cert(CERT))
    assert found.is_authority and found.covers("LOCALHOST") and found.covers("[::1]")
    assert not found.covers("192.0.2.7")
    assert found._replace(names=("*.lan",)).covers("box.lan")
    faults = ocp.faults_of(found, "192.0.2.7", found.expires_s + 1)
    assert [bool(re.search(word, fault)) for word, fault in zip(
        ("expired", "not for 192.0.2.7", "CA:TRUE"), faults)] == [True] * 3


# ---------------------------------------------------------------------------
# The server's settings
# ---------------------------------------------------------------------------

SETTINGS = "# mine\nCLAUDE_AUTH_MODE=multi\nOCP_TLS_CERT=\nX='a b'\n"


def installed(home: Path, text: str = SETTINGS) -> Path:
    write_record(home, DEAD_URL, env_file=str(home / ".ocp/ocp.env"))
    path = home / ".ocp/ocp.env"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_service_gets_the_certificate_and_a_copy_of_its_settings_stays(tmp_path: Path) -> None:
    path = installed(tmp_path)

    ran = tls(tmp_path)

    assert ran.code == 0 and "  1. ocp restart\n" in ran.stdout, ran
    cert = cert_path(tmp_path)
    assert path.read_text() == (
        "# mine\nCLAUDE_AUTH_MODE=multi\nX='a b'\n"
        f"OCP_TLS_CERT={cert}\nOCP_TLS_KEY={cert.parent}/key.pem\n")
    (copy,) = path.parent.glob("ocp.env.ocp-*")
    assert copy.read_text() == SETTINGS and stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    record = json.loads((tmp_path / ".ocp/install.json").read_text())
    assert record["url"] == DEAD_URL.replace("http:", "https:") and record["label"]
    command = re.search(r"curl .*", ran.stdout)
    assert command and "https://192.0.2.7:1/connect" in command[0]
    assert command[0].count("--fingerprint SHA256:") == 1


def test_twice_changes_nothing_and_off_takes_it_back(tmp_path: Path) -> None:
    path = installed(tmp_path)
    tls(tmp_path)
    text = path.read_text()

    assert tls(tmp_path).code == 0
    assert path.read_text() == text and len(list(path.parent.glob("ocp.env.ocp-*"))) == 1

    assert tls(tmp_path, "--off").code == 0
    assert path.read_text() == SETTINGS.replace("OCP_TLS_CERT=\n", "")
    record = json.loads((tmp_path / ".ocp/install.json").read_text())
    assert record["url"] == DEAD_URL and cert_path(tmp_path).exists()


def test_a_certificate_of_the_users_own_stays(tmp_path: Path) -> None:
    path = installed(tmp_path, "OCP_TLS_CERT=~/own.pem\nOCP_TLS_KEY=~/own.key\n")
    text = path.read_text()

    ran = tls(tmp_path)

    assert ran.code == 1 and "~/own.pem" in ran.stderr and path.read_text() == text
    assert not cert_path(tmp_path).exists()


def test_a_service_of_the_machine_is_left_to_root(tmp_path: Path) -> None:
    write_record(tmp_path, DEAD_URL, platform="systemd-system",
                 env_file=str(tmp_path / ".ocp/ocp.env"))

    ran = tls(tmp_path, user_id=1000)

    assert ran.code == 4 and "sudo ocp tls" in ran.stderr and not cert_path(tmp_path).exists()


def test_without_a_service_the_commands_are_shown(tmp_path: Path) -> None:
    ran = tls(tmp_path)

    assert f"    env OCP_TLS_CERT={cert_path(tmp_path)} OCP_TLS_KEY=" in ran.stdout
    assert [line for line in ran.stdout.splitlines() if line.startswith("  2. tell `ocp`")], ran
    assert "export OCP_URL=https://127.0.0.1:3456" in ran.stdout
    assert tls(tmp_path, "--off").code == 1


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".ocp").write_text("")

    ran = tls(tmp_path)

    assert ran.code == 1 and str(tmp_path / ".ocp") in ran.stderr and "Traceback" not in ran.stderr


# ---------------------------------------------------------------------------
# Who looks at it
# ---------------------------------------------------------------------------

def test_show_tells_names_fingerprint_and_expiry(tmp_path: Path) -> None:
    none = tls(tmp_path, "--show")
    assert none.code == 1 and "`ocp tls` makes one" in none.stderr
    found = made(tmp_path)

    ran = tls(tmp_path, "--show")
    later = SkippingClock()
    later.ahead_s = 900 * DAY_S
    expired = tls(tmp_path, "--show", clock=later)
    later.ahead_s = 800 * DAY_S
    soon = tls(tmp_path, "--show", clock=later)

    assert ran.code == 0 and found["fingerprint"] in ran.stdout and "192.0.2.7" in ran.stdout
    assert "expires" in ran.stdout and "in use       not yet" in ran.stdout
    assert soon.code == 0 and re.search(r"it expires in (19|20) days", soon.stdout)
    assert expired.code == 1 and "it has expired: run `ocp tls`" in expired.stdout


def doctor(home: Path, url: str, address: str) -> Json:
    env = ocp_env(home, "doctor", "--json", environ={"OCP_URL": url},
                  addresses=lambda: [address])
    checks = json.loads(run_env(env).stdout)["checks"]
    return next(check for check in checks if check["id"] == "certificate")


def test_lan_keys_and_doctor_know_the_server_by_its_certificate(tmp_path: Path) -> None:
    found = made(tmp_path)
    settings = {"OCP_TLS_CERT": found["certificate"], "OCP_TLS_KEY": found["key"],
                "CLAUDE_AUTH_MODE": "multi"}
    with running_server(tmp_path / "server", env=settings) as server:
        url = f"https://127.0.0.1:{server.port}"
        environ = {"OCP_URL": url, "OCP_HOME": str(server.ocp_home)}
        near = {"environ": environ, "addresses": lambda: ["127.0.0.1"]}
        lan = run_env(ocp_env(tmp_path, "lan", **near))
        made_key = ocp.Answer(url, json.dumps({"connectUrl": url}))
        advice = "\n".join(ocp.key_advice(made_key, "secret"))
        check = doctor(tmp_path, url, "127.0.0.1")
        shown = run_env(ocp_env(tmp_path, "tls", "--show", **{
            **near, "environ": {"OCP_URL": url}}))

    pin = found["fingerprint"].replace("SHA256:", "sha256//")
    line = (f"curl -fsS --insecure --pinnedpubkey {pin} {url}/connect "
            f"| python3 - {url} --fingerprint {found['fingerprint']}")
    assert lan.code == 0 and line in lan.stdout, lan
    assert line in advice and "a tool that trusts" in advice, advice
    assert check["level"] == "PASS", check
    assert "in use       yes" in shown.stdout and line in shown.stdout


def test_a_certificate_that_clients_refuse_is_said_by_lan_and_doctor(tmp_path: Path) -> None:
    with running_server(tmp_path / "server", env=write_tls_files(tmp_path)) as server:
        url = f"https://127.0.0.1:{server.port}"
        lan = run_env(ocp_env(tmp_path, "lan", environ={"OCP_URL": url},
                              addresses=lambda: ["127.0.0.1"]))
        check = doctor(tmp_path, url, "127.0.0.1")

    assert lan.code == 1 and "CA:TRUE" in lan.stdout and "`ocp tls`" in lan.stdout
    assert check["level"] == "FAIL" and "CA:TRUE" in check["message"]


def test_a_server_that_was_not_restarted_since_is_told_from_a_dead_one(tmp_path: Path) -> None:
    def said(url: str) -> tuple[str, Json]:
        env = ocp_env(tmp_path, "doctor", "--json", environ={"OCP_URL": url})
        checks = json.loads(run_env(env).stdout)["checks"]
        found = run_env(ocp_env(tmp_path, "status", environ={"OCP_URL": url}))
        assert found.code == ocp.Exit.UNREACHABLE, found
        return found.stderr, next(each for each in checks if each["id"] == "service_running")

    with stub_server() as plain:
        words, check = said(plain.url.replace("http:", "https:"))
    assert "speaks http, not https" in words and f"--url {plain.url}" in words
    assert check["level"] == "FAIL" and "not restarted" in check["message"]
    assert "start it again" in json.dumps(check["fix"]), check
    with running_server(tmp_path / "server", env=write_tls_files(tmp_path)) as server:
        words, check = said(f"http://127.0.0.1:{server.port}")
    assert "speaks https, not http" in words and "not restarted" in check["message"]


def test_of_a_server_of_http_doctor_says_how_to_change_that(tmp_path: Path) -> None:
    with stub_server() as server:
        check = doctor(tmp_path, server.url, "127.0.0.1")

    assert check["level"] == "INFO" and "`ocp tls`" in check["message"]


def test_doctor_looks_after_the_mode_of_the_key(tmp_path: Path) -> None:
    key = Path(made(tmp_path)["key"])
    key.chmod(0o644)
    facts = ocp.Facts(ocp_env(tmp_path, "doctor"))

    assert str(key) in ocp.run_check(
        next(check for check in ocp.CHECKS if check.id == "file_modes"), facts).message
    assert os.path.exists(key)
