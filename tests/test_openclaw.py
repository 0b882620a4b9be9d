"""OpenClaw as people use it, over the real server: registration, turns, the plugin, its service.

support.client_folders() says where the program is looked for. It needs a newer node than most
machines have, so one is installed beside it. The plugin's own tests run on any node.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

import pytest
from openclaw_registration import openclaw_model, openclaw_patch
from support import (
    REPO,
    Place,
    Reply,
    Server,
    clean_env,
    descendants,
    eventually,
    find_client,
    how_to_install,
    http_call,
    kill_all,
    processes_with,
    running_server,
)

Json = Any

NODE = (find_client("node") or Path("/none")).resolve()
PROGRAM = (find_client("openclaw") or Path("/none")).resolve()
PLUGIN = REPO / "ocp-plugin"
MODELS = json.loads((REPO / "models.json").read_text())["models"]
HAIKU = "claude-haiku-4-5-20251001"
OPUS = "claude-opus-5"
#: Models that are there before us.
ELSEWHERE, ANOTHER = "anthropic/claude-opus-4-6", "anthropic/claude-sonnet-4-6"

#: A turn takes ten seconds on an idle machine, and most of that is OpenClaw's own start.
RUN_TIMEOUT_S = 180
QUESTION = "What do these say?"
SESSION = ("--session-id", "11111111-1111-4111-8111-111111111111")

needs_openclaw = pytest.mark.skipif(
    not (NODE.exists() and PROGRAM.exists()),
    reason=how_to_install("openclaw"))


# ---------------------------------------------------------------------------
# OpenClaw in a home of its own
# ---------------------------------------------------------------------------

class Ran(NamedTuple):
    """How a command ended."""
    code: int
    stdout: str
    stderr: str


class OpenClaw:
    """OpenClaw with a home of its own, which asks nobody but this machine.

    It has a model with a fallback already, as somebody has who comes to us."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = home / ".openclaw/openclaw.json"
        self.file.parent.mkdir(parents=True)
        # Its log is in the system's folder for temporary files.
        (home / "tmp").mkdir(exist_ok=True)
        self.env = clean_env(
            HOME=str(home), PATH=f"{NODE.parent}:/usr/bin:/bin", TMPDIR=str(home / "tmp"))
        # Not by `config patch`, since each command takes seconds.
        self.file.write_text(json.dumps({
            "update": {"checkOnStart": False},
            "agents": {"defaults": {
                "heartbeat": {"every": "0m"},
                "model": {"primary": ELSEWHERE, "fallbacks": [ANOTHER]}}}}))

    def command(self, *args: str) -> list[str]:
        return [str(NODE), str(PROGRAM), *args]

    def run(self, *args: str, stdin: str = "") -> Ran:
        process = subprocess.Popen(
            self.command(*args), env=self.env, cwd=self.home, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            stdout, stderr = process.communicate(stdin.encode(), timeout=RUN_TIMEOUT_S)
        finally:
            end_group(process)
        return Ran(process.returncode, stdout.decode(), stderr.decode())

    def good(self, *args: str, stdin: str = "") -> str:
        """The output of a command that has to go well."""
        ran = self.run(*args, stdin=stdin)
        assert ran.code == 0, ran
        return ran.stdout

    def patch(self, patch: Mapping[str, Json]) -> str:
        return self.good("config", "patch", "--stdin", stdin=json.dumps(patch))

    def register(self, url: str, api: str = "openai-completions", model_id: str = OPUS) -> None:
        """The provider claude-local as the primary one, which fails closed."""
        patch = openclaw_patch(MODELS, url, model=openclaw_model("primary", model_id))
        if api != "openai-completions":
            # Only the other api takes a provider without a key.
            patch["models"]["providers"]["claude-local"].update(api=api, apiKey="any")
        self.patch(patch)

    def config(self) -> Json:
        return json.loads(self.file.read_text())

    def turn(self, message: str, *more: str) -> Ran:
        return self.run("agent", "--local", *SESSION, "--message", message, *more)

    def install_plugin(self, config: Json, more: Mapping[str, Json] = {}) -> None:
        """The plugin with its settings, and what else is to be patched."""
        self.good("plugins", "install", "--link", str(PLUGIN), "--force", "--accept-capabilities")
        self.patch({"plugins": {"entries": {"ocp": {"config": config}}}, **more})


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # All of it has ended.
    process.communicate()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def openclaw(tmp_path: Path) -> OpenClaw:
    return OpenClaw(tmp_path / "openclaw")


# ---------------------------------------------------------------------------
# Registration: what the patch says
# ---------------------------------------------------------------------------

@pytest.mark.parametrize(("role", "current", "keep", "wanted"), [
    ("primary", None, False, {"primary": "claude-local/m", "fallbacks": []}),
    ("primary", {"primary": "x/y", "fallbacks": ["a/b"]}, False,
     {"primary": "claude-local/m", "fallbacks": []}),
    ("primary", {"primary": "x/y", "fallbacks": ["a/b", "claude-local/m"]}, True,
     {"primary": "claude-local/m", "fallbacks": ["a/b"]}),
    ("backup", None, False, {"primary": "claude-local/m", "fallbacks": []}),
    ("backup", "x/y", False, {"primary": "x/y", "fallbacks": ["claude-local/m"]}),
    ("backup", {"primary": "x/y", "fallbacks": ["claude-local/m", "a/b"]}, False,
     {"primary": "x/y", "fallbacks": ["a/b", "claude-local/m"]}),
])
def test_a_primary_model_fails_closed_and_a_backup_comes_last(
    role: str, current: Json, keep: bool, wanted: Json,
) -> None:
    assert openclaw_model(role, "m", current, keep) == wanted


def test_the_plugin_says_the_same_as_the_scripts(shared_server: Server) -> None:
    node = shutil.which("node") or (str(NODE) if NODE.exists() else None)
    if node is None:
        pytest.skip("no node")
    rows = shared_server.call("GET", "/v1/models").json()["data"]
    rows[0]["efforts"] = ["low", "high"]
    program = (
        f"import {{ providerEntry }} from {json.dumps((PLUGIN / 'lib/registration.js').as_uri())};"
        f"console.log(JSON.stringify(providerEntry('http://x', {json.dumps(rows)}, false)))")

    said = subprocess.run(
        [node, "--input-type=module", "-e", program], capture_output=True, timeout=30, check=True)

    patch = openclaw_patch(rows, "http://x")
    assert json.loads(said.stdout) == patch["models"]["providers"]["claude-local"]


def test_the_tests_of_the_plugin_pass() -> None:
    node = shutil.which("node") or (str(NODE) if NODE.exists() else None)
    if node is None:
        pytest.skip("no node")

    ran = subprocess.run(
        [node, "--test"], cwd=PLUGIN, env=clean_env(), capture_output=True, timeout=60)

    assert ran.returncode == 0, ran.stdout.decode()


def test_the_parts_of_the_plugin_agree_on_its_version() -> None:
    package = json.loads((PLUGIN / "package.json").read_text())
    manifest = json.loads((PLUGIN / "openclaw.plugin.json").read_text())
    assert package["version"] == manifest["version"]


# ---------------------------------------------------------------------------
# Registration: what OpenClaw makes of it
# ---------------------------------------------------------------------------

@needs_openclaw
def test_openclaw_takes_the_patch_without_a_warning_and_only_once(openclaw: OpenClaw) -> None:
    openclaw.register("http://127.0.0.1:3456")

    before = openclaw.file.read_text()
    openclaw.register("http://127.0.0.1:3456")
    assert openclaw.file.read_text() == before
    assert json.loads(openclaw.good("config", "validate", "--json"))["warnings"] == []
    defaults = openclaw.config()["agents"]["defaults"]
    assert defaults["model"] == {"primary": f"claude-local/{OPUS}", "fallbacks": []}
    assert "models" not in defaults and "allow" not in openclaw.config().get("plugins", {})
    shown = openclaw.good("models", "list")
    assert all(f"claude-local/{row['id']}" in shown for row in MODELS)


@needs_openclaw
def test_a_key_in_openclaws_store_can_be_replaced(openclaw: OpenClaw, tmp_path: Path) -> None:
    key = "ocp_second_key_0123456789abcdefgh"
    env = {"CLAUDE_AUTH_MODE": "shared", "PROXY_API_KEY": key}
    with running_server(tmp_path / "server", [[{"say": "pong"}]], env=env) as server:
        openclaw.patch(openclaw_patch(MODELS, server.url, has_key=True))
        paste = ("models", "auth", "paste-api-key", "--provider", "claude-local")
        openclaw.good(*paste, stdin="ocp_first\n")
        openclaw.good(*paste, stdin=f"{key}\n")

        ran = openclaw.run("infer", "model", "run", "--local", "--model", f"claude-local/{HAIKU}",
                           "--prompt", "Reply pong", "--json")

    assert ran.code == 0 and "pong" in ran.stdout, ran
    assert "ocp_" not in openclaw.file.read_text()


# ---------------------------------------------------------------------------
# Turns
# ---------------------------------------------------------------------------

def tool(command: str) -> dict[str, Json]:
    return {"tool": {"name": "exec", "input": {"command": command}}}


ROUND = [[{"say": "Let me look."}, tool("echo one-$((40 + 2))"), tool("cat note.txt")],
         [{"say": "They say what they say."}]]


@needs_openclaw
@pytest.mark.parametrize("api", ["openai-completions", "anthropic-messages"])
def test_a_turn_runs_two_tools_and_goes_on(
    openclaw: OpenClaw, tmp_path: Path, api: str,
) -> None:
    scenario = {"turns": ROUND, "shared": True, "repeat_last": False}
    with running_server(tmp_path / "server", scenario) as server:
        openclaw.register(server.url, api)
        workspace = openclaw.home / ".openclaw/workspace"
        workspace.mkdir(exist_ok=True)
        (workspace / "note.txt").write_text("The word is cormorant.\n")

        ran = openclaw.turn(QUESTION)

        assert ran.code == 0 and "They say what they say." in ran.stdout, ran
        answers = server.log_entries("answer_finished")
        assert [entry["stop_reason"] for entry in answers] == ["tool_use", "end_turn"]
        first, last = (json.dumps(query["messages"]) for query in server.queries()[-2:])
    assert QUESTION in first and QUESTION in last
    assert "one-42" in last and "cormorant" in last
    assert last.count("BEGIN_OPENCLAW_INTERNAL_CONTEXT") == 1


@needs_openclaw
def test_thinking_can_be_switched_off(openclaw: OpenClaw, tmp_path: Path) -> None:
    with running_server(tmp_path / "server", [[{"say": "Yes."}]]) as server:
        openclaw.register(server.url)

        ran = openclaw.turn(QUESTION, "--thinking", "off")

        assert ran.code == 0, ran
        assert server.queries()[-1]["thinking"] == 0


class Bystander(ThreadingHTTPServer):
    """Another provider that OpenClaw knows, and that nobody may ask."""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), BystanderHandler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class BystanderHandler(BaseHTTPRequestHandler):
    server: Bystander

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@needs_openclaw
def test_when_the_plan_is_used_up_nobody_else_is_asked(
    openclaw: OpenClaw, tmp_path: Path,
) -> None:
    limit = {"api_error": {"status": 429, "word": "rate_limit", "text": "You've hit your limit"},
             "resets_at": int(time.time()) + 5000}
    bystander = Bystander()
    with serving(bystander), running_server(tmp_path / "server", [[limit]]) as server:
        other = openclaw_patch(MODELS, bystander.url, provider="other", model={
            "primary": ELSEWHERE, "fallbacks": [f"other/{OPUS}"]})
        openclaw.patch(other)
        openclaw.register(server.url)

        ran = openclaw.turn(QUESTION)

        assert ran.code != 0, ran
        assert len(server.queries()) == 1
    assert bystander.asked == []


# ---------------------------------------------------------------------------
# A gateway, with Telegram on loopback
# ---------------------------------------------------------------------------

class Telegram(ThreadingHTTPServer):
    """A Bot API whose users say what a test wants, and which keeps what it is told to send."""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), TelegramHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.updates: Queue[Json] = Queue()
        self.sent: list[str] = []
        self.commands: list[str] = []
        self.number = 0
        self.is_polled = threading.Event()

    def ask(self, text: str, chat: int = 42, timeout_s: float = 60) -> str:
        """What the bot says to a message of user 42."""
        before = len(self.sent)
        self.number += 1
        kind = {"type": "private"} if chat == 42 else {"type": "supergroup", "title": "Us"}
        self.updates.put({"update_id": self.number, "message": {
            "message_id": self.number, "date": int(time.time()), "text": text,
            "from": {"id": 42, "is_bot": False, "first_name": "Ann"},
            "chat": {"id": chat, **kind},
            "entities": [{"type": "bot_command", "offset": 0, "length": len(text.split()[0])}]}})
        eventually(lambda: len(self.sent) > before, timeout_s)
        return self.sent[before]


class TelegramHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Telegram

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = self.path.rpartition("/")[2].partition("?")[0]
        result = self.result(method, json.loads(given or b"{}"))
        answer = json.dumps({"ok": True, "result": result}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def result(self, method: str, body: Json) -> Json:
        bot = self.server
        if method == "getMe":
            return {"id": 99, "is_bot": True, "first_name": "Bot", "username": "ocp_bot"}
        if method == "getUpdates":
            bot.is_polled.set()
            try:
                return [bot.updates.get(timeout=0.5)]
            except Empty:
                return []
        if method == "setMyCommands":
            bot.commands = [command["command"] for command in body["commands"]]
        if method == "sendMessage":
            bot.sent.append(body["text"])
            return {"message_id": 1000 + len(bot.sent), "date": 0, "text": "",
                    "chat": {"id": body["chat_id"], "type": "private"}}
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


def start_command(place: Place) -> list[str]:
    """A command for the plugin that starts the server on the fake claude of a place."""
    variables = {**place.env({}, ()), "CLAUDE_PROXY_PORT": None}
    pairs = [f"{name}={value}" for name, value in variables.items() if value is not None]
    return ["/usr/bin/env", *pairs, sys.executable, str(REPO / "ocp_server.py")]


class Gateway:
    """A running gateway with the plugin."""

    def __init__(self, openclaw: OpenClaw, proxy_port: int, telegram: Telegram) -> None:
        self.openclaw, self.proxy_port, self.telegram = openclaw, proxy_port, telegram
        self.log = openclaw.home / "gateway.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                openclaw.command("gateway", "run", "--bind", "loopback"), env=openclaw.env,
                cwd=openclaw.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def health(self) -> Reply | None:
        try:
            return http_call(self.proxy_port, "GET", "/health", timeout_s=3)
        except OSError:
            return None

    def proxies(self) -> list[int]:
        """The pids of the servers that the gateway has started."""
        found = [each.pid for each in descendants(self.process.pid)]
        return [pid for pid in found
                if b"ocp_server.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


@contextmanager
def running_gateway(
    openclaw: OpenClaw, telegram: Telegram, proxy_port: int, **config: Json,
) -> Iterator[Gateway]:
    openclaw.install_plugin({"host": "127.0.0.1", "port": proxy_port, **config}, {
        "gateway": {"mode": "local", "port": free_port(),
                    "auth": {"mode": "token", "token": "any"}},
        "channels": {"telegram": {
            "enabled": True, "botToken": "99:any", "apiRoot": telegram.url,
            "dmPolicy": "allowlist", "allowFrom": ["42"],
            "groupPolicy": "open", "groups": {"*": {"requireMention": False}}}}})
    gateway = Gateway(openclaw, proxy_port, telegram)
    try:
        assert telegram.is_polled.wait(90), gateway.log.read_text()
        yield gateway
    finally:
        end_group(gateway.process)


@pytest.fixture
def telegram() -> Iterator[Telegram]:
    bot = Telegram()
    with serving(bot):
        yield bot


@needs_openclaw
def test_the_gateway_starts_the_proxy_and_keeps_it_running(
    openclaw: OpenClaw, telegram: Telegram, tmp_path: Path,
) -> None:
    place = Place(tmp_path / "server")
    place.prepare()
    port = free_port()
    try:
        with running_gateway(
            openclaw, telegram, port, command=start_command(place), restartDelayMs=100,
        ) as gateway:
            eventually(gateway.health, 60)
            assert "ocp" in telegram.commands
            assert "<b>OCP status</b>" in telegram.ask("/ocp status")
            assert "ocp_" in telegram.ask("/ocp keys add phone")
            assert "private chat" in telegram.ask("/ocp keys add other", chat=-100123)

            (crashing,) = gateway.proxies()
            os.kill(crashing, signal.SIGKILL)
            eventually(lambda: gateway.proxies() not in ([], [crashing]), 20)
            eventually(gateway.health, 20)

            assert "The proxy is back" in telegram.ask("/ocp restart")
            assert gateway.stop() == 0
            eventually(lambda: gateway.health() is None, 10)
        assert not place.fake_log.exists() or '"query"' not in place.fake_log.read_text()
    finally:
        kill_all(sorted(processes_with(place.folder)))


@needs_openclaw
def test_a_proxy_that_runs_already_is_adopted_and_outlives_the_gateway(
    openclaw: OpenClaw, telegram: Telegram, tmp_path: Path,
) -> None:
    env = {"OCP_ADMIN_KEY": "admin-0123456789abcdef", "CLAUDE_AUTH_MODE": "multi"}
    with running_server(tmp_path / "server", env=env) as server:
        with running_gateway(
            openclaw, telegram, server.port, adminKey=env["OCP_ADMIN_KEY"],
        ) as gateway:
            assert "None." in telegram.ask("/ocp sessions")
            assert "adopted" in gateway.log.read_text()
            assert gateway.proxies() == []
            assert gateway.stop() == 0
        assert server.call("GET", "/health").status == 200


# ---------------------------------------------------------------------------
# Signing in
# ---------------------------------------------------------------------------

def typed_into(command: Sequence[str], env: Mapping[str, str], answers: Json) -> str:
    """What a program shows on a terminal where each of these questions is answered."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], list(command), {**env, "TERM": "xterm"})
    # Without a size it would show one character per line.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    shown, left = b"", list(answers)
    deadline_s = time.monotonic() + 90
    try:
        while time.monotonic() < deadline_s:
            if select.select([terminal], [], [], 0.4)[0]:
                piece = os.read(terminal, 1 << 16)
                if not piece:
                    break
                shown += piece
            elif left and left[0][0].encode() in shown[-6000:]:
                os.write(terminal, left.pop(0)[1].encode())
    except OSError:
        pass  # So a terminal ends whose program has ended.
    finally:
        os.close(terminal)
        kill_all([pid])
        os.waitpid(pid, 0)
    return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode(errors="replace")


@needs_openclaw
def test_signing_in_by_the_other_name_writes_the_provider_and_fails_closed(
    openclaw: OpenClaw, tmp_path: Path,
) -> None:
    openclaw.install_plugin({"models": ["claude-sonnet-5", OPUS]})
    key = "ocp_shared_key_0123456789abcdefgh"
    env = {"CLAUDE_AUTH_MODE": "shared", "PROXY_API_KEY": key}
    with running_server(tmp_path / "server", env=env) as server:
        shown = typed_into(
            openclaw.command("models", "auth", "login", "--provider", "claude-max-proxy",
                             "--method", "local", "--set-default"),
            openclaw.env,
            [("Host of the OCP", "\r"), ("Port", "\x7f" * 4 + f"{server.port}\r"),
             ("API key of", f"{key}\r"), ("Models to use", "\r"), ("Default model", "\r")])

    config = openclaw.config()
    assert "Default model set to ocp/claude-sonnet-5" in shown, shown
    assert config["models"]["providers"]["ocp"]["baseUrl"] == f"{server.url}/v1"
    assert config["agents"]["defaults"]["model"] == {
        "primary": "ocp/claude-sonnet-5", "fallbacks": []}
    status = openclaw.good("models", "status")
    assert "ocp/claude-sonnet-5" in status and "Fallbacks (0)" in status
    assert key not in openclaw.file.read_text()
