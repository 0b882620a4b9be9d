"""One client against all others: whatever one client does, another one with a key is served, and
the memory of the server stays within its bound."""
from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attackers import ATTACKS, highest_memory, wait_beside
from depth import by_depth
from keys import MULTI, new_key
from server import running_server

Json = Any

MODULE = Path(__file__).resolve().parent.parent / "kit" / "attackers.py"
#: Far above what is measured on a quiet machine (see bench/README.md), and far below what a server
#: without bounds needs: half a minute and more.
WORST_WAIT_S = 15
#: How long an attack goes on. Its worst is soon reached.
ATTACK_S = by_depth(1.5, 1.5, 4)
#: What the documentation promises, for the largest body of 32 MB.
MEMORY_BYTES = 70_000_000 + 12 * 33_554_432


@contextlib.contextmanager
def attack(name: str, port: int, key: str) -> Iterator[None]:
    """An attack goes on while the block does."""
    command = [sys.executable, str(MODULE), name, str(port), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ATTACKS)
def test_beside_an_attacker_an_innocent_client_is_served(tmp_path: Path, name: str) -> None:
    env = {**MULTI, "CLAUDE_MAX_CONCURRENT": "4", "OCP_MAX_CONNECTIONS": "64"}
    with running_server(tmp_path, env=env) as server:
        innocent, attacker = (new_key(server, name=word)["key"] for word in ("good", "bad"))
        with highest_memory(server.pid) as peak, attack(name, server.port, attacker):
            wait = wait_beside(server.port, innocent, ATTACK_S)

    assert set(wait.statuses) == {200}, wait
    assert wait.worst_s < WORST_WAIT_S, wait
    assert peak[0] < MEMORY_BYTES
