"""The real claude and the clients that tests run: where they are, and how to get them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Optional

from project import REPO, clean_env

#: Where .ci/install.py puts the two versions of the real program.
REAL_CLAUDES = (".claude-cli/old", ".claude-cli/new")
HOW_TO_INSTALL = (
    "no real claude: python3 .ci/install.py .claude-cli/new, or name programs in OCP_TEST_CLAUDES")
#: Where it puts the clients, each folder with node_modules/.bin or bin.
CLIENT_FOLDERS = (
    ".agents", ".agents/codex", ".agents/python", ".agents/instructor", ".agents/aider",
    ".openclaw", ".schemathesis", ".qr", ".channels")
#: Client, or a library for Python -> its folder in .ci/versions.txt.
CLIENTS = {
    "codex": ".agents/codex",
    "opencode": ".agents",
    "cn": ".agents",
    "cline": ".agents",
    "ai": ".agents",
    "llm": ".agents/python",
    "langchain_openai": ".agents/python",
    "openai": ".agents/python",
    "langgraph": ".agents/python",
    "pydantic_ai": ".agents/python",
    "agents": ".agents/python",
    "dspy": ".agents/python",
    # It asks for an old version of openai.
    "instructor": ".agents/instructor",
    # It asks for old versions of what the others need too.
    "aider": ".agents/aider",
    "litellm": ".agents/aider",
    "openclaw": ".openclaw",
    "node": ".openclaw",
    "schemathesis": ".schemathesis",
    "jsqr": ".qr",
    # python-telegram-bot
    "telegram": ".channels",
    # discord.py
    "discord": ".channels",
    # qq-botpy
    "botpy": ".channels",
    "dingtalk_stream": ".channels",
    "openclaw-weixin": ".openclaw",
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
    """Where clients are looked for: in OCP_TEST_AGENTS, else where .ci/install.py puts them."""
    named = os.environ.get("OCP_TEST_AGENTS")
    folders = named.split(os.pathsep) if named else CLIENT_FOLDERS
    return [REPO / folder for folder in folders if folder]


def find_client(name: str) -> Optional[Path]:
    """The path of a client, None if it is nowhere.

    Only what was installed for the tests is taken, whatever else the machine has; but any node
    runs the clients that came without one."""
    places = ("node_modules/.bin", "bin")
    paths = [folder / place / name for folder in client_folders() for place in places]
    found = next((path for path in paths if path.exists()), None)
    if found is None and name == "node" and (other := shutil.which(name)):
        return Path(other)
    return found


def how_to_install(name: str) -> str:
    """The reason of a test that is skipped because a client or a library is not there."""
    return (f"no {name}: python3 .ci/install.py {CLIENTS[name]}, "
            "or name folders in OCP_TEST_AGENTS")


def claude_version(path: Path) -> str:
    shown = subprocess.run(
        [str(path), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        env=clean_env(), timeout=120, check=True)
    return shown.stdout.decode().split()[0]


def real_claude_env(stub_url: str) -> dict[str, str]:
    """What a real claude needs to talk to a stub of the API instead of the API."""
    return {
        "ANTHROPIC_BASE_URL": stub_url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-test",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
