"""What `ocp tenants check` runs with the node of an OpenClaw in a container, run by a real node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import Ran, run_to_end
from programs import find_client, how_to_install
from project import clean_env, free_port, load_script
from server import running_server
from tls_files import CERT, write_tls_files

NODE = find_client("node")
ADMIN_KEY = "admin-0123456789abcdef"


@pytest.mark.skipif(not NODE, reason=how_to_install("node"))
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_node_runs_in_a_container_asks_this_server_and_no_other(
    tmp_path: Path, scheme: str
) -> None:
    files = write_tls_files(tmp_path) if scheme == "https" else {}
    env = {**files, "OCP_ADMIN_KEY": ADMIN_KEY, "CLAUDE_AUTH_MODE": "multi"}
    key = tmp_path / "key"
    key.write_text("wrong\n")

    def ask(*words: str) -> Ran:
        command = [str(NODE), "-e", load_script("ocp_tenants")._ASK_SCRIPT, *words]
        return run_to_end(command, env=clean_env(), cwd=tmp_path, timeout_s=120)

    with running_server(tmp_path / "server", env=env) as server:
        url, ca = f"{scheme}://127.0.0.1:{server.port}", CERT if files else ""
        health, refused = ask(url, ca), ask(url, ca, str(key))
        elsewhere = ask(url, "") if files else ask(f"http://127.0.0.1:{free_port()}", "")

    assert (health.code, json.loads(health.stdout)["authMode"]) == (0, "multi"), health
    assert (refused.code, json.loads(refused.stdout)["error"]["code"]) == (1, "invalid_api_key")
    assert elsewhere.code == 1 and elsewhere.stdout == "" and elsewhere.stderr
