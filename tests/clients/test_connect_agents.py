"""Programs that find OCP with nothing but what ocp_connect.py wrote into an empty home.

programs.client_folders() says where they are looked for, and CLIENTS there how to get them.
The claude behind the server is the fake one; Claude Code as a client is the real one.
"""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from depth import rest
from processes import Ran, kill_all, processes_with, run_to_end
from programs import HOW_TO_INSTALL, client_folders, find_client, how_to_install, real_claudes
from project import REPO, clean_env, load_script
from server import Server, running_server

connect = load_script("ocp_connect")
RUN_TIMEOUT_S = 300
KEY = "ocp_" + "k3y" * 10 + "42"
QUESTION, ANSWER = "Say hello there", "The cormorant says hello."


def program(name: str) -> Path:
    """Where a program is; skips the test if it is not there."""
    path = find_client(name)
    if path is None:
        pytest.skip(how_to_install(name))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scenario = {"turns": [[{"say": ANSWER}]]}
    with running_server(
        tmp_path_factory.mktemp("server"), scenario, env={"PROXY_API_KEY": KEY}
    ) as running:
        yield running


class SecureServer(NamedTuple):
    server: Server
    fingerprint: str


@pytest.fixture(scope="module")
def secure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    """The same behind the certificate that `ocp tls` makes."""
    operator = tmp_path_factory.mktemp("operator")
    done = subprocess.run(
        [sys.executable, str(REPO / "ocp.py"), "tls", "--json"], env=clean_env(HOME=str(operator)),
        stdout=subprocess.PIPE, check=True)
    made = json.loads(done.stdout)
    settings = {"PROXY_API_KEY": KEY, "OCP_TLS_CERT": made["certificate"],
                "OCP_TLS_KEY": made["key"]}
    with running_server(
        tmp_path_factory.mktemp("secure"), {"turns": [[{"say": ANSWER}]]}, env=settings
    ) as running:
        yield SecureServer(running, made["fingerprint"])


class ConnectDesk:
    """A home with nothing in it, and a PATH with the programs of one tool."""

    def __init__(self, server: Server, folder: Path, fingerprint: str = "") -> None:
        self.server = server
        self.fingerprint = fingerprint
        self.home, self.work, self.bin = (folder / name for name in ("home", "work", "bin"))
        for each in (self.home, self.work, self.bin):
            each.mkdir()

    def install(self, *names: str) -> None:
        for name in names:
            (self.bin / name).symlink_to(program(name))

    def run(self, *command: str, **env: str) -> Ran:
        """A program from start to end. Whatever it has started ends with it."""
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        return run_to_end(
            command, env=clean_env(HOME=str(self.home), **{**env, "PATH": path}), cwd=self.work,
            timeout_s=RUN_TIMEOUT_S)

    def connect(self, *more: str) -> Ran:
        """ocp_connect as a file; it has to succeed."""
        pin = ["--https", "--fingerprint", self.fingerprint] if self.fingerprint else []
        ran = self.run(sys.executable, str(REPO / "ocp_connect.py"), "127.0.0.1", "--port",
                       str(self.server.port), *pin, "--key", KEY, "--yes", *more)
        assert ran.code == 0, ran
        return ran

    def in_new_shell(self, *command: str, **env: str) -> Ran:
        """A program that a new shell starts, with the variables that were written for it."""
        line = f". ~/.profile; exec {shlex.join(command)}"
        return self.run("sh", "-c", line, SHELL="/bin/sh", **env)


@pytest.fixture
def desk(server: Server, tmp_path: Path) -> Iterator[ConnectDesk]:
    yield ConnectDesk(server, tmp_path)
    # Cline leaves a daemon behind, in a session of its own.
    kill_all(sorted(processes_with(tmp_path)))


@pytest.fixture
def secure_desk(secure_server: SecureServer, tmp_path: Path) -> Iterator[ConnectDesk]:
    yield ConnectDesk(secure_server.server, tmp_path, secure_server.fingerprint)
    kill_all(sorted(processes_with(tmp_path)))


# ---------------------------------------------------------------------------
# One prompt each
# ---------------------------------------------------------------------------

QUIET = {f"OPENCODE_DISABLE_{name}": "1"
         for name in ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")}
AIDER = ("--no-git", "--yes-always", "--no-stream", "--no-pretty", "--no-check-update",
         "--analytics-disable", "--no-show-release-notes")
#: Tool -> the programs that it needs, and a command that asks the question.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    "codex": (("codex", "node"), ("codex", "exec", "--skip-git-repo-check", QUESTION), {}),
    "opencode": (("opencode", "node"), ("opencode", "run", QUESTION), QUIET),
    "continue": (("cn", "node"), ("cn", "-p", QUESTION), {}),
    "cline": (("cline", "node"), ("cline", "--json", QUESTION), {}),
    "llm": (("llm",), ("llm", QUESTION), {}),
    "aider": (("aider",), ("aider", *AIDER, "--message", QUESTION), {}),
}


def seed_aider(home: Path) -> None:
    """A list of prices, which Aider would fetch from a network that tests do not use."""
    caches = home / ".aider" / "caches"
    caches.mkdir(parents=True)
    (caches / "model_prices_and_context_window.json").write_text('{"none": {}}')


EVERY_TOOL = pytest.mark.parametrize("tool", ["codex", *rest(*sorted({*CASES} - {"codex"}))])


@pytest.mark.exhaustive
@EVERY_TOOL
def test_a_program_answers_with_only_what_was_written(desk: ConnectDesk, tool: str) -> None:
    programs, command, env = CASES[tool]
    desk.install(*programs)
    desk.connect("--only", tool)
    if tool == "aider":
        seed_aider(desk.home)
    asked_before = len(desk.server.queries())

    ran = desk.run(*command, **env)

    assert ran.code == 0 and ANSWER in ran.stdout, ran
    assert len(desk.server.queries()) > asked_before
    assert "[ERROR]" not in ran.stderr


@EVERY_TOOL
def test_a_program_trusts_the_certificate_by_only_what_was_written(
    secure_desk: ConnectDesk, tool: str
) -> None:
    programs, command, env = CASES[tool]
    secure_desk.install(*programs)
    secure_desk.connect("--only", tool)
    if tool == "aider":
        seed_aider(secure_desk.home)
    # Continue has a setting of its own, and so no shell was changed.
    start = secure_desk.run if tool == "continue" else secure_desk.in_new_shell

    ran = start(*command, **env)

    assert ran.code == 0 and ANSWER in ran.stdout, ran
    undone = secure_desk.run(sys.executable, str(REPO / "ocp_connect.py"), "undo", "--yes")
    assert undone.code == 0 and not (secure_desk.home / ".config/ocp").exists()
    assert not (secure_desk.home / ".profile").exists()


#: A provider of the user's own that has OCP's name, and leads where nobody answers.
TAKEN = {
    "codex": (".codex/config.toml",
              '[model_providers.ocp]\nname = "mine"\nbase_url = "http://127.0.0.1:9/v1"\n'),
    "opencode": (".config/opencode/opencode.json",
                 '{"provider": {"ocp": {"options": {"baseURL": "http://127.0.0.1:9/v1"}}}}\n'),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("tool", ["codex", *rest("opencode")])
def test_a_program_finds_ocp_beside_a_provider_of_the_same_name(
    desk: ConnectDesk, tool: str
) -> None:
    programs, command, env = CASES[tool]
    desk.install(*programs)
    path = desk.home / TAKEN[tool][0]
    path.parent.mkdir(parents=True)
    path.write_text(TAKEN[tool][1])

    said = desk.connect("--only", tool).stdout
    ran = desk.run(*command, **env)

    assert "OCP is called ocp-2" in said and "http://127.0.0.1:9/v1" in path.read_text()
    assert ran.code == 0 and ANSWER in ran.stdout, ran


#: Of a model that it does not know, Codex believes no more than this, and keeps a twentieth of it.
CODEX_MOST_TOKENS = 272_000


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["sonnet", "haiku"])
def test_codex_takes_the_window_of_the_model(desk: ConnectDesk, family: str) -> None:
    desk.install(*CASES["codex"][0])
    reply = desk.server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    row = next(row for row in reply.json()["data"] if family in row["id"])
    window = row["context_window"]
    said = desk.connect("--only", "codex").stdout
    # The default model is a Sonnet; another is named as the hint says.
    more = ("-c", f"model_context_window={window}", "-m", row["id"]) if family == "haiku" else ()
    assert more or f"-c model_context_window={window} -m {row['id']}" in said

    ran = desk.run(*CASES["codex"][1], *more)

    assert ran.code == 0, ran
    (log,) = (desk.home / ".codex/sessions").rglob("rollout-*.jsonl")
    used = min(window, CODEX_MOST_TOKENS) * 95 // 100
    assert f'"model_context_window":{used}' in log.read_text().replace(" ", "")


@EVERY_TOOL
def test_undo_leaves_nothing_of_ours_behind(desk: ConnectDesk, tool: str) -> None:
    desk.install(*CASES[tool][0])
    desk.connect("--only", tool)

    ran = desk.run(sys.executable, str(REPO / "ocp_connect.py"), "--undo", "--yes")

    assert ran.code == 0, ran
    left = [path for path in desk.home.rglob("*") if path.is_file()]
    holding = [path for path in left if KEY.encode() in path.read_bytes()
               or str(desk.server.port).encode() in path.read_bytes()]
    logs = {"log", "logs", "cache", ".cache", "snapshots"}
    assert not [path for path in holding if not logs & set(path.parts)]


MESSAGES = "[{'role': 'user', 'content': 'Hi'}]"
#: Library -> a program that names neither an address nor a key.
LIBRARIES = {
    "openai": f"""
import openai
answer = openai.OpenAI().chat.completions.create(model="haiku", messages={MESSAGES})
print(answer.choices[0].message.content)
""",
    "langchain_openai": """
from langchain_openai import ChatOpenAI
print(ChatOpenAI(model="haiku").invoke("Hi").content)
""",
    "litellm": f"""
import litellm
answer = litellm.completion(model="openai/haiku", messages={MESSAGES})
print(answer.choices[0].message.content)
""",
}


def python_with(library: str) -> str:
    """A Python that has a library; skips the test if there is none."""
    # To import it only to see whether it is there would take seconds.
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({library!r}) is None)"
    beside = [folder / "bin/python" for folder in client_folders()]
    for python in [Path(sys.executable), *(path for path in beside if path.exists())]:
        if not subprocess.run([python, "-c", look]).returncode:
            return str(python)
    pytest.skip(how_to_install(library))


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", ["openai", *rest("langchain_openai", "litellm")])
def test_a_library_finds_the_server_in_a_new_shell(desk: ConnectDesk, library: str) -> None:
    python = python_with(library)
    desk.connect("--only", "shell")
    (desk.work / "ask.py").write_text(LIBRARIES[library])

    ran = desk.run("sh", "-c", f". ~/.profile; exec {python} ask.py", SHELL="/bin/sh",
                   LITELLM_LOCAL_MODEL_COST_MAP="True")

    assert ran.stdout.strip() == ANSWER, ran


SECURE_LIBRARIES = {**LIBRARIES, "anthropic": f"""
import anthropic
answer = anthropic.Anthropic().messages.create(model="haiku", max_tokens=9, messages={MESSAGES})
print(answer.content[0].text)
"""}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "library", ["openai", *rest("anthropic", "langchain_openai", "litellm")])
def test_a_library_trusts_the_certificate_in_a_new_shell(
    secure_desk: ConnectDesk, library: str
) -> None:
    python = python_with(library)
    secure_desk.connect("--only", "shell", "--anthropic")
    (secure_desk.work / "ask.py").write_text(SECURE_LIBRARIES[library])

    ran = secure_desk.in_new_shell(python, "ask.py", LITELLM_LOCAL_MODEL_COST_MAP="True")

    assert ran.stdout.strip() == ANSWER, ran


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl: apt-get install curl")
def test_curl_trusts_the_certificate_and_the_systems_in_a_new_shell(
    secure_desk: ConnectDesk
) -> None:
    secure_desk.connect("--only", "shell")

    ran = secure_desk.in_new_shell(
        "curl", "-fsS", f"https://127.0.0.1:{secure_desk.server.port}/health")

    assert json.loads(ran.stdout)["status"] == "ok", ran
    bundle = (secure_desk.home / ".config/ocp/ca-bundle.pem").read_text()
    assert bundle.count("BEGIN CERTIFICATE") > 10


# ---------------------------------------------------------------------------
# OpenClaw
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
def test_openclaw_validates_and_answers_one_prompt(desk: ConnectDesk) -> None:
    desk.install("openclaw", "node")

    ran = desk.connect("--only", "openclaw")

    assert "config patch" in ran.stdout
    config = json.loads((desk.home / ".openclaw/openclaw.json").read_text())
    assert config["agents"]["defaults"]["model"] == {
        "primary": "claude-local/claude-sonnet-5-5", "fallbacks": []}
    assert "models" not in config["agents"]["defaults"]
    assert "allow" not in config.get("plugins", {})
    valid = json.loads(desk.run("openclaw", "config", "validate", "--json").stdout)
    assert valid["valid"] is True and not valid["warnings"]
    answer = desk.run(
        "openclaw", "infer", "model", "run", "--local", "--model",
        "claude-local/claude-haiku-4-5-20251001", "--prompt", QUESTION, "--json")
    assert answer.code == 0 and ANSWER in answer.stdout, answer


@pytest.mark.exhaustive
def test_openclaw_trusts_the_certificate_in_its_configuration(secure_desk: ConnectDesk) -> None:
    secure_desk.install("openclaw", "node")
    secure_desk.connect("--only", "openclaw")

    answer = secure_desk.run(
        "openclaw", "infer", "model", "run", "--local", "--model",
        "claude-local/claude-haiku-4-5-20251001", "--prompt", QUESTION, "--json")

    assert answer.code == 0 and ANSWER in answer.stdout, answer


@pytest.mark.exhaustive
def test_openclaw_twice_changes_nothing_and_undo_gives_the_bytes_back(desk: ConnectDesk) -> None:
    desk.install("openclaw", "node")
    config = desk.home / ".openclaw/openclaw.json"
    config.parent.mkdir()
    config.write_text('{\n  // mine\n  gateway: { mode: "local" },\n}\n')
    before = config.read_bytes()

    desk.connect("--only", "openclaw")
    after = config.read_bytes()
    again = desk.connect("--only", "openclaw")

    assert config.read_bytes() == after
    assert "Everything is up to date" in again.stdout
    undone = desk.run(sys.executable, str(REPO / "ocp_connect.py"), "--undo", "--yes")
    assert undone.code == 0 and config.read_bytes() == before


# ---------------------------------------------------------------------------
# Claude Code
# ---------------------------------------------------------------------------

def test_claude_code_answers_on_a_machine_where_it_is_not_logged_in(desk: ConnectDesk) -> None:
    found = real_claudes()
    if not found:
        pytest.skip(HOW_TO_INSTALL)
    (desk.bin / "claude").symlink_to(found[-1][1].resolve())

    desk.connect("--only", "claude-code", "--anthropic")
    ran = desk.run("claude", "-p", "--model", "haiku", "--", QUESTION,
                   CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1")

    assert (ran.code, ran.stdout.strip()) == (0, ANSWER), ran


@pytest.mark.exhaustive
def test_claude_code_trusts_the_certificate_in_its_settings(secure_desk: ConnectDesk) -> None:
    found = real_claudes()
    if not found:
        pytest.skip(HOW_TO_INSTALL)
    (secure_desk.bin / "claude").symlink_to(found[-1][1].resolve())
    secure_desk.connect("--only", "claude-code", "--anthropic")

    ran = secure_desk.run("claude", "-p", "--model", "haiku", "--", QUESTION,
                          CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1")

    assert (ran.code, ran.stdout.strip()) == (0, ANSWER), ran
