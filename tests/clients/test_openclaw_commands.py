"""The table of commands that tenants may run, against the real OpenClaw."""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from programs import find_client, how_to_install
from project import load_script

ocp = load_script("ocp_server.py")

Json = Any


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", ocp.OPENCLAW_COMMANDS, ids=lambda row: " ".join(row.words))
def test_openclaw_has_each_command_of_the_table_with_these_options(
    row: Json, tmp_path: Path
) -> None:
    openclaw = find_client("openclaw")
    if openclaw is None:
        pytest.skip(how_to_install("openclaw"))
    env = {"PATH": f"{openclaw.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    told = subprocess.run(
        [str(openclaw), *row.words, "--help"], env=env, stdin=subprocess.DEVNULL, timeout=120,
        capture_output=True, text=True, check=True).stdout

    has_value = {name: bool(value) for name, value in re.findall(
        r"^  (?:-\w, )?--([\w-]+)( <)?", told, re.MULTILINE)}
    assert {name: has_value.get(name) for name in row.options} == row.options
    usage = re.search(r"^Usage: openclaw (.*)$", told, re.MULTILINE)
    assert usage is not None
    words, _, rest = usage.group(1).partition(" [options]")
    assert re.sub(r"\|\w+", "", words) == " ".join(row.words)
    assert len(re.findall(r"[\[<]\w+[\]>]", rest)) == row.max_words
