"""Tenants: what of them goes upstream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keys import MULTI, as_admin, ask_as, new_key
from rig import Claude, Rig, running_rig

Json = Any

PROMPT = "You act for Alice.\n<!-- openclaw-tenant: alice -->"
TOOL = {"type": "function", "function": {
    "name": "openclaw", "parameters": {"type": "object", "properties": {}}}}


def ask(rig: Rig, name: str, prompt: str = "") -> dict[str, Json]:
    """The body upstream of a question of a new key, which is a tenant's if there is a prompt."""
    made = new_key(rig.server, name=name)
    if prompt:
        path = f"/api/keys/{name}/tenant"
        assert as_admin(rig.server, "PUT", path, {"prompt": prompt}).status == 201
        env = as_admin(rig.server, "PATCH", f"{path}/env", {"A_SECRET": "canary"})
        assert env.status == 200
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    reply = ask_as(rig.server, made["key"], messages=messages, tools=[TOOL])
    assert reply.status == 200, reply.text
    return rig.last_body()


def test_what_a_tenant_sends_upstream_is_what_a_plain_key_sends_and_its_prompt(
    claude: Claude, tmp_path: Path
) -> None:
    with running_rig(tmp_path, claude, **MULTI) as rig:
        plain = ask(rig, "plain")
        bodies = {name: ask(rig, name, prompt) for name, prompt in (
            ("alice", PROMPT), ("bob", "You act for Bob."))}

        for name, prompt in (("alice", PROMPT), ("bob", "You act for Bob.")):
            body = bodies[name]
            assert "canary" not in json.dumps(body)
            told = json.dumps(body["system"])
            own = json.dumps(f"Be brief.\n\n{prompt}")[1:-1]
            assert own in told
            same = {**body, "system": json.loads(told.replace(own, "Be brief.")), "metadata": None}
            assert same == {**plain, "metadata": None}
        assert "Alice" not in json.dumps(bodies["bob"])
