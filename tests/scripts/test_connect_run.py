"""ocp_connect.py as people run it: from a pipe, at a terminal, against a real server."""
from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from depth import by_depth
from forks import forker
from processes import Ran
from project import REPO, clean_env, load_script
from server import Server, running_server

connect = load_script("ocp_connect")
SCRIPT = REPO / "ocp_connect.py"
SOURCE = SCRIPT.read_bytes()
SHARED_KEY = "ocp_" + "shared" * 5 + "42"
Json = Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants no key."""
    with running_server(tmp_path_factory.mktemp("open")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key of its own making."""
    with running_server(
        tmp_path_factory.mktemp("multi"), env={"CLAUDE_AUTH_MODE": "multi"}
    ) as running:
        yield running


def made_key(server: Server, name: str, **fields: Json) -> str:
    """A key from the operator of a server in mode multi."""
    admin = (server.ocp_home / "admin-key").read_text().strip()
    reply = server.call("POST", "/api/keys", {"name": name, **fields},
                        {"Authorization": f"Bearer {admin}"})
    assert reply.status == 201, reply
    return str(reply.json()["key"])


def piped(home: Path, *args: str, script: bytes = SOURCE, **env: str) -> Ran:
    """`cat ocp_connect.py | python3 - ARGS` in this home, without a terminal."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-", *args], input=script, cwd=home,
        env=clean_env(HOME=str(home), SHELL="/bin/bash", **{"PATH": "/usr/bin:/bin", **env}),
        capture_output=True, timeout=300, start_new_session=True)
    ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in ran.stderr or script != SOURCE, ran.stderr
    return ran


def connected(home: Path, *args: str, **env: str) -> Ran:
    """The same from a file, for what does not depend on the pipe."""
    ran = forker(SCRIPT).run(args, clean_env(HOME=str(home), SHELL="/bin/bash",
                             **{"PATH": "/usr/bin:/bin", **env}), home, 300)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def at(server: Server, *more: str) -> tuple[str, ...]:
    return ("127.0.0.1", "--port", str(server.port), *more)


def tree(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*")
            if path.is_file()}


# ---------------------------------------------------------------------------
# From a pipe
# ---------------------------------------------------------------------------

def test_piped_into_python_it_connects_everything_and_takes_it_back(
    server: Server, free_home: Path
) -> None:
    ran = piped(free_home, *at(server, "--all", "--yes"))

    assert ran.code == 0, ran
    assert "answers: You said" in ran.stdout and f"{server.url}/v1" in (
        (free_home / ".codex/config.toml").read_text())
    before = tree(free_home)
    again = piped(free_home, *at(server, "--all", "--yes"))
    assert again.code == 0 and "nothing was changed" in again.stdout
    assert tree(free_home) == before
    undone = piped(free_home, "--undo", "--yes")
    assert undone.code == 0 and list(free_home.iterdir()) == []


def test_what_takes_it_back_is_a_line_to_paste(server: Server, free_home: Path) -> None:
    words = at(server, "--only", "shell", "--yes")
    ran = piped(free_home, *words)
    line = f"curl -fsSL {server.url}/connect | python3 - undo"
    assert f"To undo this: {line}\n" in ran.stdout, ran
    assert piped(free_home, "undo", "--yes").code == 0

    ran = connected(free_home, *words)
    assert f"To undo this: python3 {SCRIPT} undo\n" in ran.stdout, ran


def test_a_demo_is_said_to_be_one(free_home: Path) -> None:
    shown = connect.show_server(
        connect.Server("http://box:3456", "1.0.0", (), ""), {"demo": True, "status": "ok"})
    assert "It is a demo" in shown


def test_a_server_with_keys_is_not_asked_without_one(guarded: Server, free_home: Path) -> None:
    ran = connected(free_home, *at(guarded, "--only", "shell", "--yes"))
    assert ran.code == connect.Exit.USAGE and "add --key KEY" in ran.stderr, ran
    admin = (guarded.ocp_home / "admin-key").read_text().strip()
    listed = guarded.call("GET", "/api/errors", headers={"Authorization": f"Bearer {admin}"})
    assert "missing_api_key" not in listed.body.decode()


def test_the_server_hands_it_out_to_everybody(guarded: Server) -> None:
    reply = guarded.call("GET", "/connect", headers={})

    assert reply.status == 200 and reply.body == SOURCE
    assert reply.headers["X-OCP-Version"] == connect.VERSION
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl: apt-get install curl")
def test_one_command_downloads_and_connects(server: Server, free_home: Path) -> None:
    command = (f"curl -fsSL {server.url}/connect | "
               f"{sys.executable} - 127.0.0.1:{server.port} --only codex --yes")

    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=clean_env(HOME=str(free_home)),
        capture_output=True, text=True, timeout=300, start_new_session=True)

    assert done.returncode == 0 and "answers: You said" in done.stdout, done
    assert (free_home / ".codex/config.toml").exists()


def test_from_a_pipe_no_list_of_models_is_taken_from_the_current_folder(
    server: Server, free_home: Path
) -> None:
    (free_home / "models.json").write_text('{"models": [{"id": "planted"}]}')
    (free_home / ".openclaw").mkdir()
    provider = {"baseUrl": f"{server.url}/v1", "models": []}
    (free_home / ".openclaw/openclaw.json").write_text(
        json.dumps({"models": {"providers": {"ocp": provider}}}))

    ran = piped(free_home, "--sync", f"127.0.0.1:{server.port}", "--dry-run")

    assert ran.code == 0 and "claude-haiku" in ran.stdout and "planted" not in ran.stdout, ran


@pytest.mark.exhaustive
def test_a_download_that_was_cut_does_nothing(server: Server, free_home: Path) -> None:
    tail = len(SOURCE) - 400
    step, last_step = by_depth((9_000, 199), (9_000, 199), (1_000, 57))
    cuts = [*range(0, len(SOURCE), step), *range(tail, len(SOURCE) - 1, last_step)]
    main_at = SOURCE.rindex(b"if __name__")
    assert main_at > tail and b"\n" not in SOURCE[main_at:].rstrip().partition(b"\n")[2]
    driver = (
        "import json, os, sys\n"
        "source, cuts = open(sys.argv[1], 'rb').read(), json.loads(sys.argv[2])\n"
        "sys.argv[1:] = sys.argv[3:]\n"
        "for cut in cuts:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            exec(compile(source[:cut], '-', 'exec'), {'__name__': '__main__'})\n"
        "        except BaseException:\n"
        "            pass\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n")

    done = subprocess.run(
        [sys.executable, "-c", driver, str(SCRIPT), json.dumps(cuts), *at(server, "--yes")],
        env=clean_env(HOME=str(free_home)), capture_output=True, text=True, timeout=600)

    assert (done.returncode, done.stdout) == (0, "") and list(free_home.iterdir()) == []


def test_the_whole_script_does_something_in_the_same_surroundings(
    server: Server, free_home: Path
) -> None:
    assert piped(free_home, *at(server, "--only", "aider", "--yes"),
                 script=SOURCE.rstrip()).code == 0
    assert (free_home / ".aider.conf.yml").exists()


def pythons() -> list[str]:
    """The oldest and the newest Python here, and the one that runs the tests."""
    found = [shutil.which("python3.9"), shutil.which("python3.13"), sys.executable]
    for version in ("3.9", "3.13"):
        found += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    works = [path for path in found if path and not subprocess.run(
        [path, "-c", ""], capture_output=True, check=False).returncode]
    return sorted(set(works))


@pytest.mark.exhaustive
def test_every_python_here_runs_it_alone(server: Server, tmp_path: Path) -> None:
    for number, python in enumerate(pythons()):
        home = tmp_path / str(number)
        home.mkdir()

        done = subprocess.run(
            [python, "-I", "-S", str(SCRIPT), *at(server, "--all", "--yes")],
            env=clean_env(HOME=str(home), PATH="/usr/bin:/bin"), capture_output=True, timeout=300,
            stdin=subprocess.DEVNULL)

        assert done.returncode == 0, (python, done.stderr)


def test_windows_is_refused_politely() -> None:
    code = f"import sys; sys.platform = 'win32'; exec(open({str(SCRIPT)!r}).read())"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert done.returncode == 1 and "WSL" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------
# Who answers there
# ---------------------------------------------------------------------------

def test_nobody_there_is_one_sentence(free_home: Path) -> None:
    ran = connected(free_home, "127.0.0.1", "--port", "9", "--yes")

    assert ran.code == 3 and "Cannot reach http://127.0.0.1:9" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and not list(free_home.iterdir())


@pytest.mark.parametrize("answer", [
    b"HTTP/1.0 200 OK\r\n\r\n<html>", b"HTTP/1.0 404 No\r\n\r\n", b"garbage\r\n\r\n",
    b'HTTP/1.0 200 OK\r\n\r\n{"status":"ok"}', b"HTTP/1.0 200 OK\r\n\r\n[]",
    b'HTTP/1.0 302 Go\r\nLocation: http://127.0.0.1:1/\r\n\r\n',
])
def test_something_else_there_is_one_sentence(free_home: Path, answer: bytes) -> None:
    import socket
    import threading

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        ran = connected(free_home, "127.0.0.1", "--port", str(listener.getsockname()[1]), "--yes")
        thread.join()

    assert ran.code == 3 and re.search("not an OCP|Cannot reach", ran.stderr), ran
    assert "Cannot reach" not in ran.stderr or b"garbage" in answer
    assert len(ran.stderr.strip().splitlines()) == 1 and not list(free_home.iterdir())


@pytest.mark.parametrize("args", [
    (), ("a b",), ("h", "--port", "0"), ("h", "--only", "codx"), ("h", "--primary", "--backup"),
    ("h", "--key", ""), ("h", "--key", "a b"), ("--undo", "--only", ""), ("h", "--only", " ,"),
])
def test_wrong_usage_is_2(free_home: Path, args: tuple[str, ...]) -> None:
    assert connected(free_home, *args, "--yes").code == 2
    assert not list(free_home.iterdir())


def test_a_misspelt_tool_is_named_with_a_better_one(free_home: Path) -> None:
    assert "did you mean codex?" in connected(free_home, "h", "--only", "codx").stderr


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------

def test_mode_none_needs_no_key(server: Server, free_home: Path) -> None:
    ran = connected(free_home, *at(server, "--only", "aider", "--yes"))

    assert ran.code == 0 and "no key needed" in ran.stdout
    assert not (free_home / ".config/ocp/key").exists()


@pytest.mark.slow
def test_mode_shared_wants_the_key(tmp_path: Path, free_home: Path) -> None:
    with running_server(tmp_path / "server", env={"PROXY_API_KEY": SHARED_KEY}) as shared:
        without = connected(free_home, *at(shared, "--yes", "--only", "aider"))
        wrong = connected(free_home, *at(shared, "--yes", "--only", "aider", "--key", "nonsense"))
        assert not list(free_home.iterdir())
        right = connected(free_home, *at(shared, "--yes", "--only", "aider", "--key", SHARED_KEY))
        again = connected(free_home, *at(shared, "--yes", "--only", "aider"))

    assert without.code == 2 and "--key" in without.stderr
    assert wrong.code == 4 and "refused" in wrong.stderr
    assert right.code == 0 and SHARED_KEY in (free_home / ".aider.conf.yml").read_text()
    assert again.code == 0 and "nothing was changed" in again.stdout
    for ran in (without, wrong, right, again):
        assert SHARED_KEY not in ran.stdout + ran.stderr


def test_mode_multi_takes_a_devices_key_from_the_environment(
    guarded: Server, free_home: Path
) -> None:
    key = made_key(guarded, "laptop")

    ran = connected(free_home, *at(guarded, "--yes", "--only", "codex"), OCP_CONNECT_KEY=key)

    assert ran.code == 0 and key in (free_home / ".codex/config.toml").read_text()


def test_a_key_with_few_models_brings_only_those(guarded: Server, free_home: Path) -> None:
    key = made_key(guarded, "narrow", models=["haiku"])

    ran = connected(free_home, *at(guarded, "--yes", "--only", "opencode", "--key", key))

    config = json.loads((free_home / ".config/opencode/opencode.json").read_text())
    assert ran.code == 0 and list(config["provider"]["ocp"]["models"]) == [
        "claude-haiku-5-5"]
    assert config["model"] == "ocp/claude-haiku-5-5"


def test_a_revoked_key_is_said(guarded: Server, free_home: Path) -> None:
    key = made_key(guarded, "lost")
    admin = (guarded.ocp_home / "admin-key").read_text().strip()
    guarded.call("DELETE", "/api/keys/lost", None, {"Authorization": f"Bearer {admin}"})

    ran = connected(free_home, *at(guarded, "--yes", "--key", key))

    assert ran.code == 4 and "revoked" in ran.stderr and not list(free_home.iterdir())


def test_an_advertised_anonymous_key_is_used(tmp_path: Path, free_home: Path) -> None:
    settings = {"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "everybody-here",
                "PROXY_ADVERTISE_ANON_KEY": "1"}
    with running_server(tmp_path / "server", env=settings) as running:
        ran = connected(free_home, *at(running, "--yes", "--only", "aider"))

    assert ran.code == 0, ran
    assert "everybody-here" in (free_home / ".aider.conf.yml").read_text()


def test_the_key_of_one_server_is_not_sent_to_another(
    guarded: Server, tmp_path: Path, free_home: Path
) -> None:
    key = made_key(guarded, "mine")
    connected(free_home, *at(guarded, "--yes", "--only", "aider", "--key", key))
    with running_server(tmp_path / "other", env={"PROXY_API_KEY": SHARED_KEY}) as other:
        ran = connected(free_home, *at(other, "--yes", "--only", "aider"))
        assert ran.code == 2 and "--key" in ran.stderr


# ---------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------

def test_without_a_terminal_it_names_the_flag_and_changes_nothing(
    server: Server, free_home: Path
) -> None:
    ran = connected(free_home, *at(server, "--all"))

    assert ran.code == 2 and "--yes" in ran.stderr and not list(free_home.iterdir())


def on_terminal(home: Path, typed: list[tuple[str, str]], *args: str) -> tuple[int, str]:
    """`cat ocp_connect.py | python3 - ARGS` by somebody at a terminal who answers questions."""
    child, terminal = pty.fork()
    if not child:
        reading, writing = os.pipe()
        os.dup2(reading, 0)
        with open(writing, "wb") as pipe:
            if not os.fork():
                os.close(0)
                pipe.write(SOURCE)
                pipe.close()
                os._exit(0)
        os.execve(sys.executable, [sys.executable, "-", *args],
                  clean_env(HOME=str(home), SHELL="/bin/bash", PATH="/usr/bin:/bin"))
    shown, deadline_s = b"", time.monotonic() + 300
    while time.monotonic() < deadline_s:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
        if typed and typed[0][0].encode() in shown:
            os.write(terminal, typed.pop(0)[1].encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


def test_at_a_terminal_it_asks_and_yes_writes(server: Server, free_home: Path) -> None:
    code, shown = on_terminal(
        free_home, [("[Y/n]", "")], *at(server, "--only", "aider"))

    assert code == 0 and (free_home / ".aider.conf.yml").exists(), shown


def test_at_a_terminal_no_changes_nothing(server: Server, free_home: Path) -> None:
    code, shown = on_terminal(free_home, [("[Y/n]", "n")], *at(server, "--only", "aider"))

    assert code == 1 and "Nothing was changed" in shown and not list(free_home.iterdir())


def test_at_a_terminal_ctrl_d_is_no_yes(server: Server, free_home: Path) -> None:
    code, shown = on_terminal(free_home, [("[Y/n]", "\x04")], *at(server, "--only", "aider"))

    assert code == 2 and "add --yes" in shown and not list(free_home.iterdir())


def test_at_a_terminal_the_key_is_asked_for_and_not_shown(
    guarded: Server, free_home: Path
) -> None:
    key = made_key(guarded, "typed")

    code, shown = on_terminal(
        free_home, [("Key for", key), ("[Y/n]", "y")], *at(guarded, "--only", "aider"))

    assert code == 0 and key not in shown, shown
    assert key in (free_home / ".aider.conf.yml").read_text()


# ---------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------

def log_in(home: Path) -> None:
    (home / ".claude").mkdir()
    (home / ".claude/.credentials.json").write_text("{}")


def test_anthropic_is_refused_where_the_server_runs(server: Server, free_home: Path) -> None:
    log_in(free_home)

    ran = connected(free_home, *at(server, "--all", "--yes", "--anthropic"))

    assert ran.code == 1 and "drives it" in ran.stderr
    assert list(tree(free_home)) == [".claude/.credentials.json"]


def test_without_anthropic_nothing_of_anthropics_is_written(
    server: Server, free_home: Path
) -> None:
    log_in(free_home)

    assert connected(free_home, *at(server, "--all", "--yes")).code == 0

    assert not [name for name, content in tree(free_home).items() if b"ANTHROPIC_" in content]


def test_with_anthropic_elsewhere_claude_code_and_shells_are_set(
    server: Server, free_home: Path
) -> None:
    ran = connected(free_home, *at(server, "--only", "claude-code,shell", "--yes", "--anthropic"))

    settings = json.loads((free_home / ".claude/settings.json").read_text())
    assert ran.code == 0 and settings["env"]["ANTHROPIC_BASE_URL"] == server.url
    assert f"ANTHROPIC_BASE_URL={server.url}" in (free_home / ".config/ocp/env.sh").read_text()


def test_a_loop_that_is_there_already_is_said(server: Server, free_home: Path) -> None:
    log_in(free_home)
    (free_home / ".claude/settings.json").write_text(
        json.dumps({"env": {"ANTHROPIC_BASE_URL": f"http://localhost:{server.port}"}}))

    ran = connected(free_home, *at(server, "--only", "aider", "--yes"))

    assert ran.code == 0 and "round through the server" in ran.stdout


def test_an_address_of_anthropics_that_is_none_leads_nowhere(
    server: Server, free_home: Path
) -> None:
    ran = connected(free_home, *at(server, "--only", "aider", "--yes"),
                ANTHROPIC_BASE_URL="http://[::1")

    assert ran.code == 0 and "round through the server" not in ran.stdout


# ---------------------------------------------------------------------------
# Dry run, list, JSON, failure
# ---------------------------------------------------------------------------

def test_a_dry_run_writes_nothing_and_shows_all(server: Server, free_home: Path) -> None:
    ran = connected(free_home, *at(server, "--all", "--dry-run"))

    assert ran.code == 0 and "more lines" not in ran.stdout
    assert not list(free_home.iterdir())


def test_json_is_one_value(server: Server, free_home: Path) -> None:
    plan = json.loads(connected(free_home, *at(server, "--all", "--dry-run", "--json")).stdout)
    done = json.loads(connected(free_home, *at(server, "--all", "--yes", "--json")).stdout)
    listed = json.loads(connected(free_home, "--list", "--json").stdout)
    undone = json.loads(connected(free_home, "--undo", "--yes", "--json").stdout)

    assert plan["edits"] == done["edits"] and plan["server"] == server.url
    assert done["verified"] is True and len(done["written"]) == len(plan["edits"])
    assert [row["name"] for row in listed] == list(connect.TOOL_NAMES)
    assert all(row["connected"] for row in listed if row["name"] in ("codex", "zed"))
    assert sorted(undone["written"]) == sorted(done["written"])


def test_a_server_that_cannot_answer_is_said_and_is_no_success(
    tmp_path: Path, free_home: Path
) -> None:
    words = {"status": 529, "word": "overloaded", "text": "API Error: 529 Overloaded"}
    with running_server(tmp_path / "server", {"turns": [[{"api_error": words}]]}) as broken:
        ran = connected(free_home, *at(broken, "--only", "aider", "--yes"))

    assert ran.code == 1 and "does not answer: " in ran.stdout, ran
    assert (free_home / ".aider.conf.yml").exists()


def test_what_a_terminal_cannot_show_is_no_failure(server: Server, free_home: Path) -> None:
    home = free_home / "z\u00fcrich"
    home.mkdir()

    ran = piped(home, *at(server, "--only", "shell", "--yes"), PYTHONIOENCODING="ascii")

    assert ran.code == 0 and "z?rich" in ran.stdout, ran


def test_a_file_that_is_left_to_the_user_is_no_success(server: Server, free_home: Path) -> None:
    (free_home / ".aider.conf.yml").write_text("{flow: true}\n")

    ran = connected(free_home, *at(server, "--only", "aider", "--yes"))

    assert ran.code == 1 and "Add this by hand:" in ran.stdout
    assert (free_home / ".aider.conf.yml").read_text() == "{flow: true}\n"


def test_undo_with_nothing_to_undo_is_fine(free_home: Path) -> None:
    ran = connected(free_home, "--undo")

    assert ran.code == 0 and "nothing to undo" in ran.stdout


def test_every_tool_has_a_section_in_the_documentation() -> None:
    text = (REPO / "docs/clients.md").read_text("utf-8")
    missing = [tool.name for tool in connect.TOOLS if f"`{tool.name}`" not in text]
    assert not missing


def test_every_option_is_in_the_documentation() -> None:
    text = (REPO / "docs/clients.md").read_text("utf-8")
    options = [option for action in connect.build_parser()._actions
               for option in action.option_strings if option.startswith("--")]
    assert not [option for option in options if f"`{option}" not in text]
