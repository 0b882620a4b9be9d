"""The real OpenClaw takes the skills that `ocp tenants skills push` writes into its workspace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import run_to_end
from programs import find_client, how_to_install
from project import clean_env
from tenants_lab import tenants_lab

NODE = (find_client("node") or Path("/none")).resolve()
PROGRAM = (find_client("openclaw") or Path("/none")).resolve()

pytestmark = pytest.mark.skipif(
    not (NODE.exists() and PROGRAM.exists()), reason=how_to_install("openclaw"))


@pytest.mark.exhaustive
def test_openclaw_lists_a_pushed_skill_as_one_of_its_workspace(tmp_path: Path) -> None:
    with tenants_lab(tmp_path) as lab:
        lab.local()
        (lab.home / ".openclaw/workspace").mkdir()
        lab.run("add", "openclaw-local")
        skill = lab.ocp_home / "tenants/openclaw-local/skills/pushed"
        skill.mkdir(parents=True)
        (skill / "SKILL.md").write_text("---\nname: pushed\ndescription: A tool.\n---\nUse it.\n")
        assert "pushed: pushed" in lab.run("skills", "push").stdout

        environ = clean_env(
            HOME=str(lab.home), PATH=f"{NODE.parent}:/usr/bin:/bin", TMPDIR=str(tmp_path),
            OPENCLAW_NO_RESPAWN="1")
        ran = run_to_end([str(NODE), str(PROGRAM), "skills", "list", "--json"], env=environ,
                         cwd=lab.home, stdin="", timeout_s=600)

    listed = {each["name"]: each for each in json.loads(ran.stdout)["skills"]}
    assert listed["pushed"]["source"] == "openclaw-workspace" and listed["pushed"]["eligible"]
