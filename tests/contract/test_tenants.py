"""Tenants: what of them goes upstream."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from depth import by_depth
from dialects import CHAT
from http_client import Reply
from keys import ADMIN_KEY, MULTI, as_admin, ask_as, bearer, new_key
from project import load_script
from rig import ANSWER_S, MODEL, Claude, Rig, assistant, command_line, running_rig, user
from server import Server
from waiting import in_parallel

ocp = load_script("ocp_server.py")

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


#: What the API says.
HELLO = "Hello from the stub."


class Person(NamedTuple):
    """A tenant with a variable and a login of its own, and its conversation so far."""
    name: str
    key: str
    #: Nobody may see one of these anywhere.
    secrets: Sequence[str]
    messages: list[dict[str, Json]]


def person(server: Server, name: str) -> Person:
    made = new_key(server, name=name, maxConcurrent=1)
    variable, token = f"canary-env-of-{name}", f"sk-ant-oat01-canary-token-of-{name}"
    path = f"/api/keys/{name}/tenant"
    for method, more, body in (("PUT", "", {"prompt": f"You act for {name}."}),
                               ("PATCH", "/env", {"A_SECRET": variable}),
                               ("PUT", "/login", {"token": token})):
        assert as_admin(server, method, path + more, body).status in (200, 201)
    return Person(name, made["key"], (made["key"], variable, token), [])


def send(rig: Rig, who: Person, number: int) -> Reply:
    """Send the next request of a tenant, of one kind after the other. What is answered continues
    its conversation."""
    said = [*who.messages, user(f"Question {number} of {who.name}?")]
    paths = (CHAT.path, CHAT.path, "/v1/messages", "/v1/responses", CHAT.path)
    kind = number % len(paths)
    body: dict[str, Json] = {"model": MODEL, "messages": said, "stream": kind == 1}
    if paths[kind] == "/v1/responses":
        body = {"model": MODEL, "input": said}
    if kind == 2:
        body["max_tokens"] = 1000
    if kind == 4:
        body["model"] = "no-such-model"
    reply = rig.server.call("POST", paths[kind], body, bearer(who.key), timeout_s=ANSWER_S)
    assert reply.status == (404 if kind == 4 else 200), reply.text
    if kind != 4:
        who.messages[:] = [*said, assistant(HELLO)]
    return reply


def command_lines_until(end: threading.Event, server: Server) -> set[bytes]:
    """The command lines of all that the server starts meanwhile."""
    found = set()
    while not end.wait(0.02):
        found |= {command_line(pid) for pid in server.children()}
    return found


def reading_paths() -> list[str]:
    """Every path that can be read without naming something."""
    return [route.path for route in ocp.ROUTES if route.method == "GET" and "{" not in route.path
            and route.path != "/api/events"]


def test_secrets_of_tenants_get_nowhere_and_what_they_say_only_to_their_own(
    claude: Claude, tmp_path: Path
) -> None:
    env = {**MULTI, "OCP_PARKED_PROCESSES": "4", "OCP_LOG_LEVEL": "debug"}
    with running_rig(tmp_path, claude, **env) as rig:
        people = [person(rig.server, name) for name in ("alice", "bob")]
        end = threading.Event()
        with ThreadPoolExecutor() as pool:
            watched = pool.submit(command_lines_until, end, rig.server)
            try:
                replies = in_parallel([
                    lambda who=who: [send(rig, who, number) for number in
                                     range(by_depth(5, 8, 150))] for who in people])
            finally:
                end.set()

        secrets = [secret for who in people for secret in who.secrets]
        bodies = [json.dumps(body) for body in rig.bodies()]
        places = {"upstream": "".join(bodies), "output": rig.server.output,
                  "command lines": b" ".join(watched.result()).decode()}
        places.update({path.name: path.read_text() for path in (tmp_path / "ocp/logs").iterdir()})
        read = {who: {path: rig.server.call("GET", path, None, bearer(key)).text
                      for path in reading_paths()}
                for who, key in (("admin", ADMIN_KEY), *((who.name, who.key) for who in people))}
        places["admin"] = "".join(read["admin"].values())
        places["replies"] = "".join(reply.text for each in replies for reply in each)
        for where, text in places.items():
            assert len(text) > 100, where
            assert not [secret for secret in secrets if secret in text], where
        for who, other in (("alice", "bob"), ("bob", "alice")):
            own = [body for body in bodies if f"You act for {who}." in body]
            assert own and not [body for body in own if f"of {other}" in body]
            assert not [path for path, text in read[who].items() if other in text]
