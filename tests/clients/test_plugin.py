"""The plugin for OpenClaw: its own tests, and that its parts agree."""
from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from project import REPO, clean_env

PLUGIN = REPO / "ocp-plugin"


def test_the_tests_of_the_plugin_pass() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")

    ran = subprocess.run(
        [node, "--test"], cwd=PLUGIN, env=clean_env(), capture_output=True, timeout=600)

    assert ran.returncode == 0, ran.stdout.decode()


def test_the_parts_of_the_plugin_agree_on_its_version() -> None:
    package = json.loads((PLUGIN / "package.json").read_text())
    manifest = json.loads((PLUGIN / "openclaw.plugin.json").read_text())
    assert package["version"] == manifest["version"]
