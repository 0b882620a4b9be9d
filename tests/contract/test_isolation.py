"""Two callers at the same time, with everything that makes processes change hands: nothing that
one of them says, or is answered, reaches the prompts or the answers of the other."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import stub_api as stub
from depth import by_depth
from dialects import CHAT
from keys import MULTI, bearer, new_key
from rig import MODEL, Claude, Rig, running_rig

Json = Any

#: How many requests the two callers send together.
REQUESTS = by_depth(12, 12, 300)
TOOLS = [{"type": "function", "function": {
    "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}


def answer(body: Json) -> stub.Reply:
    """Answer with the canaries of the prompt, so that those of answers travel on as well."""
    said = json.dumps(body["messages"])
    canary = next(name for name in ("CANARY-ALICE", "CANARY-BOB") if name in said)
    tools = {tool["name"] for tool in body.get("tools", ())}
    if "StructuredOutput" in tools:
        return stub.tool_calls([("StructuredOutput", {"word": canary})])
    last = body["messages"][-1]["content"]
    if "Call the tool" in json.dumps(last) and any("look" in name for name in tools):
        name = next(name for name in tools if "look" in name)
        return stub.tool_calls([(name, {"at": f"{canary}-place"})])
    return stub.text(f"{canary} was heard. " * 20, chunks=20)


class Talker:
    """A caller with a key, whose every text holds a canary of its own."""

    def __init__(self, rig: Rig, canary: str, seed: int) -> None:
        self.rig = rig
        self.canary = canary
        self.key = new_key(rig.server, name=canary)["key"]
        self.random = random.Random(seed)
        self.messages: list[Json] = []
        self.heard: list[str] = []
        self.count = 0

    def say(self, text: str) -> None:
        self.count += 1
        self.messages.append(
            {"role": "user", "content": f"{self.canary} {self.count} of {text}."})

    def send(self, **fields: Json) -> Json:
        """Send the conversation and keep the answer in it."""
        body = {"model": MODEL, "messages": self.messages, **fields}
        reply = self.rig.server.call("POST", CHAT.path, body, bearer(self.key), timeout_s=120)
        self.heard.append(reply.text)
        assert reply.status == 200, reply
        message = reply.json()["choices"][0]["message"]
        self.messages.append({
            name: message[name] for name in ("role", "content", "tool_calls") if message.get(name)})
        return message

    # -- what makes processes change hands ---------------------------------------------------

    def begin_anew(self) -> None:
        self.messages = []
        self.say("a new conversation")
        self.send()

    def go_on(self) -> None:
        self.say("the same conversation")
        self.send()

    def edit(self) -> None:
        """Ask the last question in other words."""
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        del self.messages[-1:]
        self.say("an edited question")
        self.send()

    def leave(self) -> None:
        """Hang up in the middle of an answer."""
        body = {"model": MODEL, "messages": [
            *self.messages, {"role": "user", "content": f"{self.canary} leaves."}]}
        with self.rig.server.stream(CHAT.path, body, bearer(self.key), timeout_s=120) as stream:
            next(iter(stream))

    def use_a_tool(self) -> None:
        self.say("Call the tool")
        calls = self.send(tools=TOOLS).get("tool_calls", ())
        self.messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": f"{self.canary} was there."}
            for call in calls]
        self.send(tools=TOOLS)

    def fill_a_schema(self) -> None:
        self.messages = []
        self.say("a schema")
        self.send(response_format=SCHEMA)

    def go_through(self, requests: int) -> None:
        """Do what comes, at random, until so many requests were sent."""
        ways = (self.begin_anew, self.go_on, self.go_on, self.edit, self.leave, self.use_a_tool,
                self.fill_a_schema)
        self.begin_anew()
        while len(self.heard) < requests:
            self.random.choice(ways)()


@pytest.fixture(scope="module")
def house(claude: Claude, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    settings = {**MULTI, "OCP_WARM_PROCESSES": "1", "OCP_PARKED_PROCESSES": "3"}
    with running_rig(tmp_path_factory.mktemp("isolation"), claude, **settings) as rig:
        yield rig


@pytest.mark.exhaustive
def test_nothing_of_a_caller_reaches_another(house: Rig) -> None:
    house.begin()
    house.stub.default = answer
    talkers = [Talker(house, "CANARY-ALICE", 1), Talker(house, "CANARY-BOB", 2)]

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(each.go_through, REQUESTS // 2) for each in talkers]:
            done.result()

    bodies = [json.dumps(body) for body in house.bodies()]
    assert len(bodies) >= REQUESTS
    mixed = [text for text in bodies if "CANARY-ALICE" in text and "CANARY-BOB" in text]
    assert mixed == []
    assert all("CANARY-" in text for text in bodies)
    for talker, other in (talkers, talkers[::-1]):
        assert not any(other.canary in text for text in talker.heard)
