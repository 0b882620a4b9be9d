"""Agents as people use them, over the real claude: a question, and a tool that they really run.

programs.client_folders() says where the programs are looked for. Claude Code as
a client is the same program that the server drives.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import stub_api as stub
from depth import rest
from processes import Ran, kill_all, processes_with, run_to_end
from programs import find_client, how_to_install
from project import clean_env
from rig import MODEL, NEWEST_MODEL, Claude, Rig, each_claude, running_rig
from upstream import system_texts, turns
from waiting import eventually

Json = Any
Body = Mapping[str, Json]

# No agent asks for the same model with the same thinking twice: a spare would idle.

#: An agent that has not ended by then never will.
RUN_TIMEOUT_S = 300
QUESTION = "What do these say?"
#: A model that lets nobody force a call: the API refuses it. The name is the one that users write.
SONNET = "sonnet"
BEFORE, AFTER = "Let me look.", "They say what they say."

with_newest_claude = pytest.mark.parametrize("claude", each_claude()[-1:], indirect=True)


@pytest.fixture
def desk(rig: Rig, tmp_path: Path) -> AgentDesk:
    return AgentDesk(rig, tmp_path)


# ---------------------------------------------------------------------------
# Running an agent
# ---------------------------------------------------------------------------

class AgentDesk:
    """Where an agent works: a home and a folder of its own, and the server that it asks."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self.home = folder / "home"
        self.work = folder / "work"
        self.home.mkdir()
        self.work.mkdir()
        self.note = self.work / "note.txt"
        self.note.write_text("The word is cormorant.\n")
        self._logged = len(rig.server.log_entries())

    def write(self, name: str, content: str) -> None:
        """A file of the agent's settings, by its path below the home."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def run(self, command: Sequence[str], **env: str) -> Ran:
        """The agent from start to end. Whatever it has started ends with it."""
        try:
            return run_to_end(
                command, env=clean_env(HOME=str(self.home), **env), cwd=self.work,
                timeout_s=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{command[0]} does not end; so far: {self._entries()}") from None

    def _entries(self) -> list[dict[str, Json]]:
        return [entry for entry in self.rig.server.log_entries()[self._logged:]
                if "request_id" in entry and entry.get("method") != "HEAD"]

    def served(self, at_least: int = 1) -> list[dict[str, Json]]:
        """The server's log entries of this test's requests, answered or not."""
        eventually(lambda: len(self._entries()) >= at_least)
        return self._entries()

    def paths(self, count: int) -> list[str]:
        """How each request was answered: this many came, and all went well."""
        served = self.served(count)
        assert [entry["event"] for entry in served] == ["answer_finished"] * count, served
        return [entry["path"] for entry in served]


def program(name: str) -> str:
    path = find_client(name)
    if path is None:
        pytest.skip(how_to_install(name))
    return str(path.resolve())


def offered(body: Body) -> set[str]:
    """The names of the tools whose schemas the model sees."""
    return {tool["name"] for tool in body["tools"] if not tool.get("defer_loading")}


def results(body: Body) -> list[str]:
    """What the tools answered in the last message, in the order of their calls."""
    (role, blocks), (_, calls) = turns(body)[-1], turns(body)[-2]
    assert role == "user"
    ids = [block["id"] for block in calls if isinstance(block, dict)]
    found = {block["tool_use_id"]: json.dumps(block["content"])
             for block in blocks if isinstance(block, dict)}
    assert list(found) == ids
    return list(found.values())


def script_round(rig: Rig, calls: Sequence[tuple[str, Mapping[str, Json]]]) -> None:
    """The model calls these tools, and then has an answer. A request for a title has no tools."""
    replies = [stub.text(AFTER), stub.tool_calls(calls, text=BEFORE)]

    def answer(body: Body) -> stub.Reply:
        if not body["tools"]:
            return stub.text("A title")
        return replies.pop() if replies else stub.text("There were more requests than replies.")

    rig.stub.default = answer


def with_tools(rig: Rig) -> list[dict[str, Json]]:
    """The bodies that reached the API in this test, but for requests for a title."""
    return [body for body in rig.bodies() if body["tools"]]


# ---------------------------------------------------------------------------
# Codex
# ---------------------------------------------------------------------------

CODEX = """model = "{model}"
model_provider = "ocp"
[model_providers.ocp]
name = "OCP"
base_url = "{url}/v1"
env_key = "OCP_API_KEY"
wire_api = "responses"
"""


#: Codex runs everything without asking.
UNGUARDED = ("--dangerously-bypass-approvals-and-sandbox",)


def run_codex(
    desk: AgentDesk, more: str = "", *, first: str = "", sandbox: Sequence[str] = UNGUARDED,
    resume: Sequence[str] = (), model: str = MODEL,
) -> Ran:
    """Run Codex with a question; `first` and `more` stand before and behind its settings."""
    command = program("codex")
    settings = CODEX.format(model=model, url=desk.rig.server.url)
    desk.write(".codex/config.toml", f"{first}\n{settings}{more}")
    return desk.run(
        [command, "exec", "--skip-git-repo-check", *sandbox, *resume, QUESTION],
        OCP_API_KEY="any")


@pytest.mark.exhaustive
def test_codex_prints_the_answer(desk: AgentDesk) -> None:
    ran = run_codex(desk)

    assert (ran.code, ran.stdout.strip()) == (0, "Hello from the stub."), ran
    assert desk.paths(1) == ["fresh"]
    body = desk.rig.only_body()
    assert "Codex" in system_texts(body)[0]
    assert turns(body)[-1][1][-1] == QUESTION


def test_codex_runs_two_tools_and_goes_on(desk: AgentDesk) -> None:
    script_round(desk.rig, [
        ("exec_command", {"cmd": "echo one-$((40 + 2))"}),
        ("exec_command", {"cmd": "cat note.txt"})])

    ran = run_codex(desk)

    assert (ran.code, ran.stdout.strip()) == (0, AFTER), ran
    assert BEFORE in ran.stderr and "ERROR" not in ran.stderr
    assert desk.paths(2) == ["fresh", "continued"]
    first, second = desk.rig.bodies()
    assert {"exec_command", "write_stdin"} <= offered(first)
    one, note = results(second)
    assert "one-42" in one and "cormorant" in note


@pytest.mark.exhaustive
@with_newest_claude
def test_codex_works_with_a_model_that_lets_no_call_be_forced(desk: AgentDesk) -> None:
    script_round(desk.rig, [("exec_command", {"cmd": "cat note.txt"})])

    ran = run_codex(desk, model=SONNET)

    # It never forces a call itself.
    assert (ran.code, ran.stdout.strip()) == (0, AFTER), ran
    assert desk.paths(2) == ["fresh", "continued"]
    assert "cormorant" in results(desk.rig.last_body())[0]


#: A server of tools that Codex starts, with one tool.
MCP_SERVER = """
import json, sys
TOOL = {"name": "find", "description": "Finds a bird.", "inputSchema": {
    "type": "object", "properties": {"bird": {"type": "string"}}, "required": ["bird"]}}
for line in sys.stdin:
    asked = json.loads(line)
    result = {
        "initialize": {
            "protocolVersion": asked.get("params", {}).get("protocolVersion"),
            "capabilities": {"tools": {}}, "serverInfo": {"name": "birds", "version": "1"}},
        "tools/list": {"tools": [TOOL]},
        "tools/call": {"content": [{"type": "text", "text": "On the roof."}], "isError": False},
    }.get(asked["method"], {})
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


@pytest.mark.exhaustive
def test_codex_calls_a_tool_of_an_mcp_server(desk: AgentDesk) -> None:
    desk.write("birds.py", MCP_SERVER)
    script_round(desk.rig, [("mcp__birds__find", {"bird": "cormorant"})])
    server = f"[mcp_servers.birds]\ncommand = {json.dumps(sys.executable)}\n" \
             f"args = [{json.dumps(str(desk.home / 'birds.py'))}]\n"

    ran = run_codex(desk, server)

    assert (ran.code, ran.stdout.strip()) == (0, AFTER), ran
    first, second = desk.rig.bodies()
    assert "mcp__birds__find" in offered(first)
    assert "On the roof." in results(second)[0]


#: What Codex has to know of a model to offer it the tool that edits files.
CODEX_MODEL = {
    "slug": MODEL, "display_name": "Claude", "description": "Claude", "priority": 1,
    "apply_patch_tool_type": "freeform", "shell_type": "shell_command", "visibility": "list",
    "supported_in_api": True, "support_verbosity": False, "supported_reasoning_levels": [],
    "supports_reasoning_summaries": False, "supports_parallel_tool_calls": True,
    "truncation_policy": {"mode": "tokens", "limit": 10000}, "experimental_supported_tools": [],
    "context_window": 200000, "base_instructions": "You are Codex.",
}
PATCH = """*** Begin Patch
*** Update File: note.txt
@@
-The word is cormorant.
+The "word" is \\ b\u00e4r.
*** Add File: new.txt
+One line.
*** End Patch
"""


@pytest.mark.exhaustive
def test_codex_edits_files_with_its_custom_tool(desk: AgentDesk) -> None:
    desk.write("models.json", json.dumps({"models": [CODEX_MODEL]}))
    catalog = json.dumps(str(desk.home / "models.json"))
    script_round(desk.rig, [("apply_patch", {"input": PATCH})])

    ran = run_codex(desk, first=f"model_catalog_json = {catalog}")

    assert (ran.code, ran.stdout.strip()) == (0, AFTER), ran
    assert desk.note.read_text() == 'The "word" is \\ b\u00e4r.\n'
    assert (desk.work / "new.txt").read_text() == "One line.\n"
    assert desk.paths(2) == ["fresh", "continued"]
    first, second = desk.rig.bodies()
    [tool] = [tool for tool in first["tools"] if tool["name"] == "apply_patch"]
    assert "Lark grammar" in tool["description"] and "end_patch" in tool["description"]
    assert "Success" in results(second)[0]


@pytest.mark.exhaustive
def test_codex_goes_on_with_another_sandbox(desk: AgentDesk) -> None:
    run_codex(desk)

    ran = run_codex(desk, sandbox=["--sandbox", "read-only"], resume=["resume", "--last"])

    assert (ran.code, ran.stdout.strip()) == (0, "Hello from the stub."), ran
    assert desk.paths(2)[1] == "continued"
    first, second = desk.rig.bodies()
    assert system_texts(second) == system_texts(first)
    (role, added) = turns(second)[-1]
    assert role == "user" and added[-1] == QUESTION
    assert any("read-only" in str(each) for each in added), added


@pytest.mark.exhaustive
@with_newest_claude
def test_codex_gives_its_thinking_back_after_a_restart_of_the_server(
    claude: Claude, tmp_path: Path
) -> None:
    with running_rig(tmp_path / "rig", claude) as rig:
        desk = AgentDesk(rig, tmp_path)
        rig.script(stub.thinking("Hm, let me see.", AFTER))
        assert run_codex(desk).code == 0
    with running_rig(tmp_path / "rig", claude) as desk.rig:
        ran = run_codex(desk, resume=("resume", "--last"))
        assert ran.code == 0, ran
        (thought, said), = [blocks for role, blocks in turns(desk.rig.only_body())
                            if role == "assistant"]
    assert (thought["thinking"], said) == ("Hm, let me see.", AFTER)


@pytest.mark.exhaustive
def test_codex_shows_a_plan_limit_without_asking_again(desk: AgentDesk) -> None:
    desk.rig.script(then=stub.plan_limit())

    ran = run_codex(desk)

    assert ran.code == 1 and "Quota exceeded" in ran.stderr, ran
    assert len(desk.served()) == 1


@pytest.mark.exhaustive
def test_codex_shows_a_refusal_and_not_a_complaint_about_itself(desk: AgentDesk) -> None:
    desk.rig.script(then=stub.text("I cannot", stop_reason="refusal"))

    ran = run_codex(desk)

    assert "must be the user's" not in ran.stderr
    events = [entry["event"] for entry in desk.served()]
    assert "request_refused" not in events and len(events) <= 6


# ---------------------------------------------------------------------------
# OpenCode
# ---------------------------------------------------------------------------

#: The packages with which it speaks each of the three dialects.
CHAT, MESSAGES, RESPONSES = "@ai-sdk/openai-compatible", "@ai-sdk/anthropic", "@ai-sdk/openai"
OPENCODE_QUIET = {
    f"OPENCODE_DISABLE_{name}": "1"
    for name in ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")}


def set_up_opencode(desk: AgentDesk, package: str, model: str = MODEL) -> str:
    """Write the settings; return the path of the program."""
    command = program("opencode")
    models = {model: {"name": model, "limit": {"context": 200000, "output": 32000}}}
    provider = {
        "npm": package, "name": "OCP", "models": models,
        "options": {"baseURL": f"{desk.rig.server.url}/v1", "apiKey": "{env:OCP_API_KEY}"}}
    desk.write(".config/opencode/opencode.json", json.dumps({
        "model": f"ocp/{model}", "small_model": f"ocp/{model}", "provider": {"ocp": provider}}))
    return command


def run_opencode(desk: AgentDesk, package: str) -> Ran:
    command = set_up_opencode(desk, package)
    return desk.run([command, "run", QUESTION], OCP_API_KEY="any", **OPENCODE_QUIET)


@contextmanager
def opencode_server(desk: AgentDesk, package: str) -> Iterator[str]:
    """Run OpenCode's server, which takes what `opencode run` has no option for; give its URL."""
    command = set_up_opencode(desk, package, SONNET)
    env = clean_env(HOME=str(desk.home), OCP_API_KEY="any", **OPENCODE_QUIET)
    with subprocess.Popen(
        [command, "serve", "--port", "0"], cwd=desk.work, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as running:
        assert running.stdout is not None
        try:
            urls = (re.search(r"http://\S+", line) for line in running.stdout)
            yield next(found[0] for found in urls if found)
        finally:
            running.kill()
            kill_all(sorted(processes_with(desk.home.parent)))


def posted(url: str, body: Json) -> Json:
    """Return the JSON that a server answers to a POST of JSON."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=RUN_TIMEOUT_S) as reply:
        return json.load(reply)


# Only with the newest claude, because this agent takes seconds to start.
@pytest.mark.exhaustive
@with_newest_claude
@pytest.mark.parametrize("package", [CHAT, MESSAGES, RESPONSES])
def test_opencode_runs_two_tools_and_goes_on(desk: AgentDesk, package: str) -> None:
    script_round(desk.rig, [
        ("bash", {"command": "echo one-$((40 + 2))", "description": "Counts"}),
        ("read", {"filePath": str(desk.note)})])

    ran = run_opencode(desk, package)

    assert ran.code == 0 and "Error" not in ran.stderr, ran
    assert [line for line in ran.stdout.splitlines() if line] == [BEFORE, AFTER]
    # The title is asked for beside the first step.
    paths = sorted(desk.paths(3))
    assert paths[0] == "continued" and set(paths[1:]) <= {"fresh", "rewound"}
    first, second = with_tools(desk.rig)
    assert "OpenCode" in system_texts(first)[0]
    assert {"bash", "read", "edit"} <= offered(first)
    one, note = results(second)
    assert "one-42" in one and "cormorant" in note


@pytest.mark.exhaustive
@with_newest_claude
@pytest.mark.parametrize("package", [CHAT, MESSAGES, RESPONSES])
def test_opencode_gets_an_answer_of_a_form_by_a_call_that_it_forces(
    desk: AgentDesk, package: str
) -> None:
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}

    def answer(body: Body) -> stub.Reply:
        names = [tool["name"] for tool in body["tools"]]
        # claude has a tool of this name, so the model sees the client's under another one.
        forced = [name for name in names if name.startswith("StructuredOutput")]
        if not forced:
            return stub.text("A title")
        return stub.tool_calls([(forced[0], {"word": "cormorant"})])

    desk.rig.stub.default = answer
    with opencode_server(desk, package) as url:
        session = posted(f"{url}/session", {})["id"]
        said = posted(f"{url}/session/{session}/message", {
            "parts": [{"type": "text", "text": QUESTION}],
            "model": {"providerID": "ocp", "modelID": SONNET},
            "format": {"type": "json_schema", "schema": schema}})

    assert said["info"].get("structured") == {"word": "cormorant"}, said
    (body,) = with_tools(desk.rig)
    assert "tool_choice" not in body
    assert "Call one of the tools before anything else" in system_texts(body)[-1]


# ---------------------------------------------------------------------------
# Continue
# ---------------------------------------------------------------------------

#: What is in `extraBodyProperties` becomes part of every request.
CONTINUE = """name: OCP
version: 0.0.1
schema: v1
models:
  - name: OCP
    provider: openai
    model: {model}
    apiBase: {url}/v1
    apiKey: any
    roles: [chat]
    requestOptions:
      extraBodyProperties:
        tool_choice: required
"""


@pytest.mark.exhaustive
@with_newest_claude
def test_continue_forces_a_call_in_every_round(desk: AgentDesk) -> None:
    command = program("cn")
    settings = ".continue/config.yaml"
    desk.write(settings, CONTINUE.format(model=SONNET, url=desk.rig.server.url))
    read = stub.tool_calls([("Read", {"filepath": str(desk.note)})], text=BEFORE)
    # The last two are for its second request, which forces a call too.
    desk.rig.script(read, stub.text("They say it."), stub.text(AFTER))

    ran = desk.run([command, "-p", QUESTION, "--config", str(desk.home / settings)])

    assert (ran.code, ran.stdout.strip()) == (0, AFTER), ran
    events = [entry["event"] for entry in desk.served(3)]
    assert events == ["answer_finished", "call_missing", "answer_finished"]
    first, second, third = desk.rig.bodies()
    assert "Read" in offered(first) and not any("tool_choice" in each for each in desk.rig.bodies())
    assert "cormorant" in results(second)[0]
    assert "Your answer must begin with a tool call" in str(third["messages"])


# ---------------------------------------------------------------------------
# Claude Code
# ---------------------------------------------------------------------------

def run_claude_code(desk: AgentDesk, model: str = MODEL) -> Ran:
    return desk.run(
        [str(desk.rig.claude.path), "-p", "--model", model, "--allowedTools", "Bash,Read",
         "--append-system-prompt", "Speak like a pirate.", "--", QUESTION],
        ANTHROPIC_BASE_URL=desk.rig.server.url, ANTHROPIC_AUTH_TOKEN="any",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1")


def script_claude_code_round(desk: AgentDesk) -> None:
    script_round(desk.rig, [
        ("Bash", {"command": "echo one-$((40 + 2))", "description": "Counts"}),
        ("Read", {"file_path": str(desk.note)})])


@pytest.mark.exhaustive
def test_claude_code_prints_the_answer(desk: AgentDesk) -> None:
    ran = run_claude_code(desk)

    assert (ran.code, ran.stdout.strip(), ran.stderr) == (0, "Hello from the stub.", "")
    assert desk.paths(1) == ["fresh"]
    assert QUESTION in turns(desk.rig.only_body())[-1][1]


@pytest.mark.parametrize("model", [MODEL, *rest(NEWEST_MODEL)])
def test_claude_code_runs_two_tools_and_goes_on(desk: AgentDesk, model: str) -> None:
    script_claude_code_round(desk)

    ran = run_claude_code(desk, model)

    assert (ran.code, ran.stdout.strip(), ran.stderr) == (0, AFTER, "")
    assert desk.paths(2) == ["fresh", "continued"]
    one, note = results(desk.rig.last_body())
    assert "one-42" in one and "cormorant" in note


@pytest.fixture(scope="module")
def claude_code_body(
    shared_rig: Rig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Json]:
    """What reaches the API of a question to Claude Code."""
    shared_rig.begin()
    run_claude_code(AgentDesk(shared_rig, tmp_path_factory.mktemp("desk")))
    return shared_rig.only_body()


@pytest.mark.exhaustive
def test_the_model_sees_the_tools_of_claude_code(claude_code_body: Body) -> None:
    assert {"Agent", "Bash", "Edit", "Read", "Write"} <= offered(claude_code_body)


@pytest.mark.exhaustive
def test_the_header_of_claude_code_does_not_swallow_its_system_prompt(
    claude_code_body: Body,
) -> None:
    header = claude_code_body["system"][0]["text"]
    assert len(header.splitlines()) == 1
    assert "Speak like a pirate." in "".join(system_texts(claude_code_body))


@pytest.mark.exhaustive
@with_newest_claude
def test_claude_code_loads_a_tool_whose_schema_it_held_back(desk: AgentDesk) -> None:
    replies = [stub.text(AFTER)]

    def answer(body: Body) -> stub.Reply:
        if len(desk.rig.bodies()) > 1:
            return replies.pop() if replies else stub.text("There were more requests than replies.")
        names = [tool["name"] for tool in body["tools"]]
        search = next(name for name in names if name.startswith("ToolSearch"))
        return stub.tool_calls([(search, {"query": "select:WebFetch", "max_results": 5})])

    desk.rig.stub.default = answer

    ran = run_claude_code(desk)

    assert (ran.code, ran.stdout.strip(), ran.stderr) == (0, AFTER, "")
    assert len(desk.paths(2)) == 2
    assert "WebFetch" in offered(desk.rig.last_body())


@pytest.mark.exhaustive
def test_claude_code_shows_a_plan_limit_without_asking_again(desk: AgentDesk) -> None:
    desk.rig.script(then=stub.plan_limit())

    ran = run_claude_code(desk)

    assert ran.code == 1 and "limit" in ran.stdout, ran
    assert len(desk.served()) == 1


@pytest.mark.exhaustive
def test_the_ids_of_claude_code_become_a_short_tag(desk: AgentDesk) -> None:
    server = desk.rig.server
    assert server.call("PATCH", "/settings", {"tagFrom": "body"}).status == 200

    run_claude_code(desk)

    rows = server.call("GET", "/api/usage?limit=1").json()["recent"]
    assert server.call("PATCH", "/settings", {"tagFrom": None}).status == 200
    assert re.fullmatch("device-[0-9a-f]{12}", rows[0]["tag"])


def stop_what_runs(desk: AgentDesk) -> None:
    """Stop the first request that has an answer begun."""
    def begun() -> list[Json]:
        found: list[Json] = desk.rig.server.call("GET", "/api/requests").json()["requests"]
        return [entry for entry in found if entry["response_chars"]]

    (entry,) = eventually(begun)
    path = f"/api/requests/{entry['request_id']}"
    assert desk.rig.server.call("DELETE", path).status == 200


# Last, because the server refuses for a while what was stopped, and others ask the same.
@pytest.mark.exhaustive
@pytest.mark.parametrize("run_agent", [run_claude_code, *rest(run_codex)])
def test_an_agent_whose_request_is_stopped_gets_nothing_by_asking_again(
    desk: AgentDesk, run_agent: Callable[[AgentDesk], Ran]
) -> None:
    desk.rig.script(then=stub.hang("To begin with, ", seconds=600))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_agent, desk)
        stop_what_runs(desk)
        ran = running.result()

    assert ran.code == 1 and "operator stopped this request" in ran.stdout + ran.stderr, ran
    assert len(desk.rig.bodies()) == 1
