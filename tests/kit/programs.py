"""The real claude and the clients that tests run: where they are, and how to get them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Optional

from project import REPO, clean_env

#: Where .ci/run installs the two versions of the real program.
REAL_CLAUDES = (".claude-cli/old", ".claude-cli/new")
HOW_TO_INSTALL = "no real claude: run .ci/run once, or name programs in OCP_TEST_CLAUDES"
#: Where .ci/run installs the clients, each folder with node_modules/.bin or bin.
CLIENT_FOLDERS = (".agents", ".agents/python", ".agents/aider", ".openclaw")
NPM, PIP = "npm install --prefix {0} {1}", "python3 -m venv {0} && {0}/bin/pip install {1}"
#: OpenClaw refuses an older node even while it is installed.
NPM_NEWER = ("npm install --prefix {0} node@24 && PATH=$PWD/{0}/node_modules/.bin:$PATH "
             "npm install --prefix {0} {1}")
#: Client, or a library for Python -> the command that installs it, its folder, its packages.
CLIENTS = {
    "codex": (NPM, ".agents", "@openai/codex"),
    "opencode": (NPM, ".agents", "opencode-ai"),
    "cn": (NPM, ".agents", "@continuedev/cli"),
    "cline": (NPM, ".agents", "cline"),
    "llm": (PIP, ".agents/python", "llm"),
    "langchain_openai": (PIP, ".agents/python", "langchain-openai"),
    "openai": (PIP, ".agents/python", "openai"),
    # It asks for old versions of what the others need too.
    "aider": (PIP, ".agents/aider", "aider-chat"),
    "litellm": (PIP, ".agents/aider", "litellm"),
    # Without its version, npm on an older node takes the very first one without a word.
    "openclaw": (NPM_NEWER, ".openclaw", "openclaw@2026.9.6"),
    "node": (NPM, ".openclaw", "node@24"),
}


def real_claudes() -> list[tuple[str, Path]]:
    """(version, path) of every real claude that contract tests can use."""
    named = os.environ.get("OCP_TEST_CLAUDES")
    if named:
        paths = [Path(path) for path in named.split(os.pathsep)]
    else:
        programs = [REPO / folder / "node_modules/.bin/claude" for folder in REAL_CLAUDES]
        paths = [path for path in programs if path.exists()]
    return [(claude_version(path), path) for path in paths]


def client_folders() -> list[Path]:
    """Where clients are looked for: the folders in OCP_TEST_AGENTS, else those of .ci/run."""
    named = os.environ.get("OCP_TEST_AGENTS")
    folders = named.split(os.pathsep) if named else CLIENT_FOLDERS
    return [REPO / folder for folder in folders if folder]


def find_client(name: str) -> Optional[Path]:
    """The path of a client, None if it is nowhere.

    Only what was installed for the tests is taken, whatever else the machine has."""
    places = ("node_modules/.bin", "bin")
    paths = [folder / place / name for folder in client_folders() for place in places]
    return next((path for path in paths if path.exists()), None)


def how_to_install(name: str) -> str:
    """The reason of a test that is skipped because a client or a library is not there."""
    command, folder, packages = CLIENTS[name]
    return (f"no {name}: run .ci/run once, or {command.format(folder, packages)}, "
            "or name folders in OCP_TEST_AGENTS")


def claude_version(path: Path) -> str:
    shown = subprocess.run(
        [str(path), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=clean_env(), timeout=30, check=True)
    return shown.stdout.decode().split()[0]


def real_claude_env(stub_url: str) -> dict[str, str]:
    """What a real claude needs to talk to a stub of the API instead of the API."""
    return {
        "ANTHROPIC_BASE_URL": stub_url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-test",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
