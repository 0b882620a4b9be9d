"""What `--check` says of the login, without a request and without a trace."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from project import REPO, clean_env
from rig import Claude


@pytest.mark.parametrize("is_logged_in", [True, False], ids=["logged in", "not logged in"])
def test_a_check_knows_the_login_of_the_owner(
    claude: Claude, tmp_path: Path, is_logged_in: bool
) -> None:
    if is_logged_in:
        log_in(tmp_path)
    before = files_below(tmp_path)
    # Whoever asks the API asks nobody here.
    env = clean_env(HOME=str(tmp_path), CLAUDE_BIN=str(claude.path), HTTPS_PROXY="http://127.0.0.1:9")

    done = subprocess.run(
        [sys.executable, str(REPO / "ocp_server.py"), "--check"], env=env, capture_output=True,
        text=True, timeout=120)

    assert done.returncode == 0, done
    words = "login: logged in\nall good\n" if is_logged_in else "login: not logged in: run "
    assert words in done.stdout
    assert files_below(tmp_path) == before


def log_in(home: Path) -> None:
    """Leave what `claude auth login` leaves in a home."""
    (home / ".claude").mkdir()
    (home / ".claude" / ".credentials.json").write_text(json.dumps({"claudeAiOauth": {
        "accessToken": "sk-ant-oat01-of-the-file", "refreshToken": "sk-ant-ort01-x",
        "expiresAt": 4102444800000, "scopes": ["user:inference", "user:profile"],
        "subscriptionType": "max",
    }}))


def files_below(folder: Path) -> dict[str, bytes]:
    return {os.path.join(place, name): Path(place, name).read_bytes()
            for place, _, names in os.walk(folder) for name in names}
