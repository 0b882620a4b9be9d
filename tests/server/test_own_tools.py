"""The server's own tools: commands of a tenant's OpenClaw and its skills, while a turn runs."""
from __future__ import annotations

import json
import os
import selectors
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chat import CHAT_PATH, both_ways, content_of, pieces, question
from depth import rest
from dialects import CHAT, MESSAGES, RESPONSES, Dialect, dialect_name
from http_client import Stream
from keys import MULTI, as_admin, ask_as, bearer, new_key
from processes import of_process
from project import load_script
from relay_program import RelayProgram, asks
from server import Server, running_server
from waiting import eventually

ocp = load_script("ocp_server.py")

Json = Any

KEEPING = {**MULTI, "OCP_PARKED_PROCESSES": "8"}
CRON_LIST = ["cron", "list", "--json"]
WAITS = "import time; print('begun', flush=True); time.sleep(600)"


def cli(*words: str, **more: Json) -> dict[str, Json]:
    """The step of a model that calls a command of OpenClaw."""
    return {"tool": {"name": "openclaw_cli", "input": {"args": list(words)}, **more}}


def reads(skill: str, **more: Json) -> dict[str, Json]:
    return {"tool": {"name": "skill_file", "input": {"skill": skill, **more}}}


#: The model looks, with one command, and then says what it has found.
LOOKING = [[{"say": "Let me look."}, cli(*CRON_LIST)], [{"say": "There are none."}]]


@pytest.fixture
def relay(tmp_path: Path) -> RelayProgram:
    return RelayProgram(tmp_path)


@pytest.fixture
def house(tmp_path: Path, relay: RelayProgram) -> Iterator[Server]:
    with running_server(tmp_path, LOOKING, env={**KEEPING, **relay.env()}) as server:
        yield server


def tenant(server: Server, name: str = "alice", **profile: Json) -> str:
    """The key of a new tenant of level `tools`, whose OpenClaw is in a container."""
    made = new_key(server, name=name, maxConcurrent=1)
    profile = {"level": "tools", "relay": {"container": "a-1"}, **profile}
    reply = as_admin(server, "PUT", f"/api/keys/{name}/tenant", profile)
    assert reply.status == 201, reply.text
    return str(made["key"])


def skill(server: Server, name: str, text: str, of: str = "alice") -> Path:
    place = Path(server.ocp_home) / "tenants" / of / "skills" / name
    place.mkdir(parents=True)
    (place / "SKILL.md").write_text(text)
    return place


def results(server: Server, number: int = -1) -> list[str]:
    """The texts of the results that the model got last before a question."""
    blocks = server.queries()[number]["messages"][-1]["content"]
    return [each["content"][0]["text"] if isinstance(each["content"], list) else each["content"]
            for each in blocks if each["type"] == "tool_result"]


def tools_of(server: Server, number: int = -1) -> list[str]:
    return [tool["name"] for tool in server.queries()[number]["tools"]]


def streamed(server: Server, key: str, **fields: Json) -> Stream:
    return server.stream(CHAT_PATH, question("hi", **fields), bearer(key))


# ---------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------

def test_a_command_runs_with_exactly_its_words_and_the_listed_variables(
    tmp_path: Path, relay: RelayProgram
) -> None:
    words = ["message", "send", "--target=-100", "--message", "a;b $(touch x) `y`\n'\"\\ \u00e9"]
    scenario = [[cli(*words)], [{"say": "Sent."}]]
    env = {**MULTI, **relay.env(), "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-canary"}
    with running_server(tmp_path, scenario, env=env) as server:
        key = tenant(server, commands="act")
        as_admin(server, "PATCH", "/api/keys/alice/tenant/env", {"A_SECRET": "canary"})
        relay.does("print('sent to', sys.argv[-1][:3]); print('and a warning', file=sys.stderr)")

        assert content_of(ask_as(server, key)) == "Sent."

        (call,) = relay.calls
        assert call["argv"] == ["exec", "--", "a-1", "openclaw", *words]
        assert call["env"].keys() <= {*ocp._RELAY_ENVIRONMENT, "LC_CTYPE"}
        assert "canary" not in json.dumps(call["env"])
        assert (call["stdin"], call["cwd"], call["session"]) == ("", "/", call["pid"])
        assert sorted(results(server)[0].split("\n")) == ["and a warning", "sent to a;b"]
        (entry,) = server.log_entries("own_tool_run")
        assert entry.pop("ms") >= 0 and entry.pop("ts")
        assert entry == {"level": "info", "event": "own_tool_run", "caller": "alice",
                         "tool": "openclaw_cli", "words": "message send", "exit": 0}
        assert "touch" not in server.output and "sent to" not in server.output


@pytest.mark.parametrize("dialect", [CHAT, *rest(MESSAGES, RESPONSES)], ids=dialect_name)
@both_ways
def test_the_messages_around_a_command_are_one_answer(
    house: Server, relay: RelayProgram, dialect: Dialect, stream: bool
) -> None:
    key = tenant(house)
    relay.does("print('no jobs'); sys.exit(3)")
    house.write_scenario([
        [*LOOKING[0], {"finish": "tool_use", "usage": {"output_tokens": 70}}],
        [*LOOKING[1], {"finish": "end_turn", "usage": {"output_tokens": 9}}]])

    body = dialect.body("What is in my cron?", stream=stream)
    answer = dialect.read_answer(house.call("POST", dialect.path, body, bearer(key)))

    assert (answer.text, answer.finish) == ("Let me look.\n\nThere are none.", "stop")
    assert list(answer.calls) == []
    # The usage is that of the last round, whose prompt has all before it.
    assert 9 in (answer.usage or {}).values()
    assert results(house) == ["no jobs\n[exit code 3]"]


def test_the_text_before_a_command_is_there_while_it_runs(
    house: Server, relay: RelayProgram
) -> None:
    key = tenant(house)
    relay.does("import time\nwhile not os.path.exists(place + '/go'): time.sleep(0.02)")
    with streamed(house, key) as stream:
        told = iter(stream)
        events = []
        while "".join(pieces(events)) != "Let me look.":
            events.append(next(told))
        eventually(lambda: relay.calls)
        (relay.folder / "go").touch()
        events += list(told)

    assert "".join(pieces(events)) == "Let me look.\n\nThere are none."


def test_a_tenant_may_get_the_last_text_only(house: Server) -> None:
    key = tenant(house, text="final")

    assert content_of(ask_as(house, key)) == "There are none."


def test_what_may_not_run_is_a_result_that_tells_the_model_what_may(
    house: Server, relay: RelayProgram
) -> None:
    key = tenant(house)
    for words in (["gateway", "stop"], ["cron", "add"], ["cron", "list", "--url", "x"], []):
        house.write_scenario([[cli(*words)], [{"say": "Oh."}]])
        assert content_of(ask_as(house, key, f"try {words}")) == "Oh."
        (told,) = results(house)
        assert "cron list" in told or "args" in told
    assert relay.calls == []
    assert house.log_entries("own_tool_run") == []


def test_where_openclaw_is_not_found_its_file_is_run(house: Server, relay: RelayProgram) -> None:
    key = tenant(house)
    relay.does("print(sys.argv[4]); sys.exit(127 if sys.argv[4] == 'openclaw' else 0)")

    ask_as(house, key)

    assert [call["argv"][3:] for call in relay.calls] == [
        ["openclaw", *CRON_LIST], ["node", "openclaw.mjs", *CRON_LIST]]
    assert results(house) == ["node"]


def test_a_command_of_a_state_folder_runs_with_the_tenants_variables(tmp_path: Path) -> None:
    openclaw = RelayProgram(tmp_path, "openclaw", "print(os.environ['A_SECRET'])")
    state = tmp_path / "state"
    state.mkdir()
    path = f"{openclaw.folder}:{os.environ['PATH']}"
    env = {**MULTI, "OCP_TENANT_LEVEL": "tools", "PATH": path}
    with running_server(tmp_path, LOOKING, env=env) as server:
        key = tenant(server, relay={"stateDir": str(state)})
        as_admin(server, "PATCH", "/api/keys/alice/tenant/env", {"A_SECRET": "of alice"})

        ask_as(server, key)

        assert results(server) == ["of alice"]
        assert openclaw.calls[0]["env"]["OPENCLAW_STATE_DIR"] == str(state)
        assert "of alice" not in server.output


def test_a_client_of_containers_that_is_not_there_is_a_result(tmp_path: Path) -> None:
    env = {**MULTI, "OCP_TENANT_LEVEL": "tools", "OCP_DOCKER": "/no/such/docker"}
    with running_server(tmp_path, LOOKING, env=env) as server:
        assert content_of(ask_as(server, tenant(server))).endswith("There are none.")
        assert results(server) == [
            "The server cannot start /no/such/docker (No such file or directory)."]


@pytest.mark.parametrize("does", ["print('x' * 300_000)", "os.write(1, b'\\xff' * 100_001)"])
def test_of_much_output_the_model_gets_the_beginning(
    house: Server, relay: RelayProgram, does: str
) -> None:
    key = tenant(house)
    relay.does(does)

    ask_as(house, key)

    text, _, note = results(house)[0].partition("\n")
    assert (len(text), note) == (100_000, "[This is the beginning: 100,000 bytes.]")


# ---------------------------------------------------------------------------
# Beside the client's tools
# ---------------------------------------------------------------------------

CLOCK = {"type": "function", "function": {
    "name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("is_own_first", [True, False], ids=["own first", "client's first"])
def test_an_own_and_a_clients_call_in_one_message_go_on_in_either_order(
    house: Server, relay: RelayProgram, is_own_first: bool
) -> None:
    key = tenant(house)
    calls = [cli(*CRON_LIST), {"tool": {"name": "clock", "id": "toolu_01clock"}}]
    house.write_scenario([calls if is_own_first else calls[::-1], [{"say": "At noon."}]])

    reply = ask_as(house, key, tools=[CLOCK]).json()["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    (call,) = reply["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    # No command runs while nobody waits for it.
    assert relay.calls == []
    messages = [{"role": "user", "content": "hi"}, reply["message"],
                {"role": "tool", "tool_call_id": call["id"], "content": "12:00"}]
    assert content_of(ask_as(house, key, messages=messages, tools=[CLOCK])) == "At noon."

    assert len({query["pid"] for query in house.queries()}) == 1
    wanted = ["no jobs", "12:00"]
    assert results(house) == (wanted if is_own_first else wanted[::-1])
    assert len(relay.calls) == 1


def test_a_command_does_not_run_again_for_a_call_that_is_missing(
    house: Server, relay: RelayProgram
) -> None:
    # A call cannot be forced with this model: an answer without it is asked for once more.
    choice = {"type": "function", "function": {"name": "clock"}}

    reply = ask_as(house, tenant(house), model="opus", tools=[CLOCK], tool_choice=choice)

    assert content_of(reply) == "Let me look.\n\nThere are none."
    assert reply.headers["X-OCP-Tool-Choice"] == "not-honoured"
    assert len(relay.calls) == 1


def test_a_clients_tool_of_an_own_tools_name_is_renamed_and_given_back(house: Server) -> None:
    key = tenant(house)
    tool = {"type": "function", "function": {
        "name": "openclaw_cli", "parameters": {"type": "object", "properties": {}}}}
    other = ocp.wire_name("openclaw_cli")
    assert other != "openclaw_cli"
    house.write_scenario([[{"tool": {"name": other, "input": {}}}]])

    reply = ask_as(house, key, tools=[tool]).json()["choices"][0]["message"]

    assert tools_of(house) == ["openclaw_cli", other]
    assert reply["tool_calls"][0]["function"]["name"] == "openclaw_cli"


def test_the_clients_tools_can_be_dropped(house: Server) -> None:
    key = tenant(house, clientTools="drop")

    reply = ask_as(house, key, tools=[CLOCK], tool_choice="required")

    assert reply.status == 200
    assert tools_of(house) == ["openclaw_cli"]
    assert "tool_choice" not in json.dumps(house.queries()[-1]["settings"])


def test_a_second_question_is_continued_after_commands(house: Server) -> None:
    key = tenant(house)
    first = content_of(ask_as(house, key))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first},
                {"role": "user", "content": "thanks"}]

    assert ask_as(house, key, messages=messages).status == 200

    assert len({query["pid"] for query in house.queries()}) == 1


def test_a_command_does_not_run_again_when_claude_dies_after_it(
    house: Server, relay: RelayProgram
) -> None:
    key = tenant(house)
    house.write_scenario([[{"say": "Hm."}], [cli(*CRON_LIST)], [{"exit": 1}]])
    ask_as(house, key)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hm."},
                {"role": "user", "content": "look"}]

    assert ask_as(house, key, messages=messages).status == 502

    assert len(relay.calls) == 1


def test_thinking_of_several_messages_is_not_put_back_as_that_of_one(
    tmp_path: Path, relay: RelayProgram
) -> None:
    scenario = [[{"think": "One."}, {"say": "Let me look."}, cli(*CRON_LIST)],
                [{"think": "Two."}, {"say": "There are none."}]]
    with running_server(tmp_path, scenario, env={**MULTI, **relay.env()}) as server:
        key = tenant(server)
        first = content_of(ask_as(server, key))
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first},
                    {"role": "user", "content": "thanks"}]
        assert ask_as(server, key, messages=messages).status == 200

        (told,) = server.lines("assistant")
        assert [block["type"] for block in told["message"]["content"]] == ["text"]


# ---------------------------------------------------------------------------
# Skills
# ---------------------------------------------------------------------------

def test_skills_are_told_and_read_and_a_folder_that_is_copied_in_is_there_at_once(
    house: Server
) -> None:
    key = tenant(house, relay=None)
    house.write_scenario([[{"say": "Hm."}]])
    ask_as(house, key, "one")
    assert tools_of(house) == [] and "notes" not in "".join(house.queries()[-1]["system"])

    skill(house, "notes", "---\ndescription: Takes notes.\n---\nWrite it down.\n")
    tenant(house, "bob", relay=None)
    skill(house, "hidden", "Of bob.", of="bob")
    house.write_scenario([[reads("notes"), reads("hidden"), reads("notes", path="../x")],
                          [{"say": "Done."}]])
    assert content_of(ask_as(house, key, "two")) == "Done."

    system = "".join(house.queries()[-1]["system"])
    assert system.endswith("- notes: Takes notes.") and "hidden" not in system
    assert tools_of(house) == ["skill_file"]
    assert [each.strip().split("\n")[-1] for each in results(house)] == [
        "Write it down.", "There is no such file.", "There is no such file."]
    assert [entry.get("words") for entry in house.log_entries("own_tool_run")] == [None] * 3
    found = as_admin(house, "GET", "/api/keys/alice/tenant").json()["skills"]
    assert found == {"enabled": True, "count": 1, "skipped": 0}


@pytest.mark.parametrize(("profile", "wanted"), [
    ({"level": "api"}, []), ({"skills": False}, ["openclaw_cli"]),
    ({"commands": "none"}, ["skill_file"]), ({"relay": None}, ["skill_file"]),
    ({}, ["openclaw_cli", "skill_file"]), ({"level": "agent"}, ["openclaw_cli", "skill_file"]),
])
def test_the_profile_says_which_own_tools_there_are(
    house: Server, profile: Mapping[str, Json], wanted: list[str]
) -> None:
    key = tenant(house, **profile)
    skill(house, "notes", "Write it down.")
    house.write_scenario([[{"say": "Hm."}]])

    ask_as(house, key)

    assert tools_of(house) == wanted
    assert ("notes" in "".join(house.queries()[-1]["system"])) == ("skill_file" in wanted)


def test_answers_with_own_tools_are_never_cached_and_others_have_the_same_spares(
    tmp_path: Path, relay: RelayProgram
) -> None:
    env = {**MULTI, **relay.env(), "CLAUDE_CACHE_TTL": "600000", "OCP_WARM_PROCESSES": "1"}
    with running_server(tmp_path, [[{"say": "Hm."}]], env=env) as server:
        eventually(lambda: as_admin(server, "GET", "/health").json()["spares"])
        key = tenant(server)
        for _ in range(2):
            assert content_of(ask_as(server, key)) == "Hm."
            eventually(lambda: as_admin(server, "GET", "/health").json()["spares"])
        assert len(server.queries()) == 2
        # The first one was a spare of everybody's.
        rows = server.log_entries("answer_finished")
        assert [row["warm"] for row in rows] == [True, True]


# ---------------------------------------------------------------------------
# The slot, and the end
# ---------------------------------------------------------------------------

def test_a_command_that_asks_with_the_same_key_does_not_wait_for_its_own_turn(
    tmp_path: Path, relay: RelayProgram
) -> None:
    env = {**MULTI, **relay.env(), "CLAUDE_MAX_CONCURRENT": "2"}
    with running_server(tmp_path, {"turns": [LOOKING[0], [{"say": "Inner."}], [{"say": "Outer."}]],
                                   "shared": True}, env=env) as server:
        key = tenant(server)
        relay.does(asks(f"{server.url}{CHAT_PATH}", key))

        assert content_of(ask_as(server, key)) == "Let me look.\n\nOuter."

        assert results(server) == ["Inner."]


def members(group: int) -> list[str]:
    """The processes of a group."""
    # After the command in brackets: state, parent, group.
    return [pid for pid in filter(str.isdecimal, os.listdir("/proc"))
            if of_process(int(pid), "stat").rpartition(b")")[2].split()[2:3]
            == [str(group).encode()]]


def is_running(pid: int) -> bool:
    stat = of_process(pid, "stat")
    return bool(stat) and b") Z" not in stat


@pytest.mark.parametrize("ending", ["hang-up", "deadline", *rest("shutdown"), "death", "kill"])
def test_a_command_ends_with_its_request_and_nothing_more_is_asked(
    tmp_path: Path, relay: RelayProgram, ending: str
) -> None:
    env = {**KEEPING, **relay.env(), "OCP_DRAIN": "0"}
    if ending == "deadline":
        env["CLAUDE_TIMEOUT"] = "3000"
    relay.does("child = os.fork()\n" + WAITS)
    with running_server(tmp_path, LOOKING, env=env) as server:
        key = tenant(server)
        with streamed(server, key, n=2) as stream:
            eventually(lambda: len(relay.calls) == 1)
            (call,) = relay.calls
            assert is_running(call["pid"])
            if ending == "hang-up":
                stream.close()
            elif ending == "death":
                os.kill(server.queries()[0]["pid"], signal.SIGKILL)
            elif ending == "shutdown":
                server.stop()
            elif ending == "kill":
                server.kill()
            else:
                list(stream)
            eventually(lambda: not is_running(call["pid"]))
            eventually(lambda: not members(call["pid"]))
        assert len(server.queries()) == 1
        assert len(relay.calls) == 1


def test_a_command_that_takes_too_long_is_ended(relay: RelayProgram) -> None:
    now_s = [1_000.0]
    watchdog = ocp.Watchdog()
    events: list[Json] = []

    class Log:
        def event(self, *words: Json, **fields: Json) -> None:
            events.append(fields)

    tools = ocp.OwnTools(
        "/", str(relay.path), dict(os.environ), watchdog, Log(), lambda: now_s[0])
    profile = {**ocp.TENANT_PROFILE, "relay": {"container": "a-1"}}
    caller = ocp.Caller("alice", tenant=ocp.Tenant("alice", profile))
    gate = ocp.Gate(ocp.Config())
    run = ocp.OwnRun(tools, caller, gate.slot(caller).lent)
    server = ocp.ToolServer((), ocp.own_tools_of(profile, ""))
    server.own_calls.append(ocp.OwnCall("call", "openclaw_cli", {"args": ["cron", "list"]}))
    relay.does(WAITS)
    sent: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        def step() -> None:
            run.advance(server, selector, sent.append)
            for key, _ in selector.select(0.05):
                key.data(selector)

        step()
        assert gate._lent == {"alice": 1}
        eventually(lambda: (step(), run._running.command.text() == "begun")[1])
        now_s[0] += 121
        step()
    assert run._running is None and gate._lent == {}
    assert not is_running(relay.calls[0]["pid"])
    assert server._results["call"]["content"][0]["text"] == (
        "begun\n[It took more than 120 s. It may still be running.]")
    assert [each.get("exit") for each in events] == [None]
    watchdog.close()
