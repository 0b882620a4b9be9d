"""OpenClaw as people use it, over the real server: registration, turns, the plugin, its service.

programs.client_folders() says where the program is looked for. It needs a newer node than most
machines have, so one is installed beside it. What ocp_connect.py writes without OpenClaw is in
tests/scripts/test_connect_openclaw.py, and the plugin's own tests are beside it.

A command of OpenClaw takes seconds, so homes, gateways and answers are shared where that shows
as much, and what can go on side by side does.
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
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Callable, NamedTuple

import pytest

from depth import DEPTH
from http_client import Reply, http_call
from processes import Ran, descendants, end_group, kill_all, processes_with, run_to_end
from programs import find_client, how_to_install
from project import REPO, clean_env, free_port
from server import Place, Server, running_server
from waiting import eventually

Json = Any

NODE = (find_client("node") or Path("/none")).resolve()
PROGRAM = (find_client("openclaw") or Path("/none")).resolve()
PLUGIN = REPO / "ocp-plugin"
MODELS = json.loads((REPO / "models.json").read_text())["models"]
SONNET, OPUS = "claude-sonnet-5-5", "claude-opus-5-5"
#: Models that are there before us; the second one's provider listens.
ELSEWHERE, ANOTHER = "anthropic/claude-opus-4-6", "bystander/any"

#: A turn takes ten seconds on an idle machine, and most of that is OpenClaw's own start.
RUN_TIMEOUT_S = 600
QUESTION = "What do these say?"

pytestmark = pytest.mark.skipif(
    not (NODE.exists() and PROGRAM.exists()),
    reason=how_to_install("openclaw"))


# ---------------------------------------------------------------------------
# OpenClaw in a home of its own
# ---------------------------------------------------------------------------

class OpenClaw:
    """OpenClaw with a home of its own, which asks nobody but this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = home / ".openclaw/openclaw.json"
        for folder in (self.file.parent, home / "bin", home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "bin/openclaw").symlink_to(PROGRAM)
        # Its log is in the system's folder for temporary files. Without the last, each command
        # starts itself a second time.
        self.env = clean_env(
            HOME=str(home), PATH=f"{home / 'bin'}:{NODE.parent}:/usr/bin:/bin",
            TMPDIR=str(home / "tmp"), OPENCLAW_NO_RESPAWN="1")

    def command(self, *args: str) -> list[str]:
        return [str(NODE), str(PROGRAM), *args]

    def run_any(self, command: Sequence[str], stdin: str = "") -> Ran:
        """A program in this home. Whatever it has started ends with it."""
        return run_to_end(
            command, env=self.env, cwd=self.home, stdin=stdin, timeout_s=RUN_TIMEOUT_S)

    def run(self, *args: str, stdin: str = "") -> Ran:
        return self.run_any(self.command(*args), stdin)

    def good(self, *args: str, stdin: str = "") -> str:
        """The output of a command that has to go well."""
        ran = self.run(*args, stdin=stdin)
        assert ran.code == 0, ran
        return ran.stdout

    def connect(self, server: Server, *more: str) -> str:
        """What ocp_connect.py says when it registers the server; it has to go well."""
        ran = self.run_any([
            sys.executable, str(REPO / "ocp_connect.py"), f"127.0.0.1:{server.port}",
            "--only", "openclaw", "--yes", *more])
        assert ran.code == 0, ran
        return ran.stdout

    def copied(self, home: Path) -> OpenClaw:
        """Another home in the same state."""
        shutil.copytree(self.file.parent, home / ".openclaw", symlinks=True)
        return OpenClaw(home)

    def config(self) -> Json:
        return json.loads(self.file.read_text())

    def write(self, config: Json) -> None:
        """A whole configuration, not by `config patch`, since each command takes seconds."""
        self.file.write_text(json.dumps(config, indent=2))

    def turn(self, message: str, *more: str) -> Ran:
        """A turn of the agent, each in the same session."""
        return self.run("agent", "--local", "--session-id",
                        "11111111-1111-4111-8111-111111111111", "--message", message, *more)


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


def own_config(bystander: Bystander) -> Json:
    """What somebody has who comes to us: a model, with another one as a fallback."""
    row = {"id": "any", "name": "Any", "contextWindow": 200_000, "maxTokens": 1000}
    return {
        "update": {"checkOnStart": False},
        "models": {"providers": {"bystander": {
            "baseUrl": f"{bystander.url}/v1", "apiKey": "any", "models": [row]}}},
        "agents": {"defaults": {
            "heartbeat": {"every": "0m"},
            "model": {"primary": ELSEWHERE, "fallbacks": [ANOTHER]}}}}


@pytest.fixture(scope="module")
def bystander() -> Iterator[Bystander]:
    server = Bystander()
    with serving(server):
        yield server


# ---------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------

class Registered(NamedTuple):
    """A home whose primary model is ours since a moment ago."""
    openclaw: OpenClaw
    url: str
    said: str


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory, bystander: Bystander
) -> Registered:
    folder = tmp_path_factory.mktemp("registered")
    openclaw = OpenClaw(folder / "home")
    openclaw.write(own_config(bystander))
    with running_server(folder / "server") as server:
        return Registered(openclaw, server.url, openclaw.connect(server, "--primary"))


@pytest.mark.exhaustive
def test_openclaw_takes_the_registration_without_a_warning(registered: Registered) -> None:
    openclaw = registered.openclaw

    verdict = json.loads(openclaw.good("config", "validate", "--json"))

    assert verdict["valid"] is True and verdict["warnings"] == []
    config = openclaw.config()
    defaults = config["agents"]["defaults"]
    assert defaults["model"] == {"primary": f"claude-local/{SONNET}", "fallbacks": []}
    assert "models" not in defaults and "allow" not in config.get("plugins", {})
    assert set(config["models"]["providers"]) == {"bystander", "claude-local"}
    assert "through: openclaw config patch" in registered.said


@pytest.mark.exhaustive
def test_openclaw_lists_every_model_of_the_provider(registered: Registered) -> None:
    listed = json.loads(registered.openclaw.good("models", "list", "--json"))["models"]

    rows = {row["key"]: row for row in listed}
    for model in MODELS:
        row = rows[f"claude-local/{model['id']}"]
        assert row["input"] == "text+image" and row["contextWindow"] == model["contextWindow"]
        assert row["available"] is True


@pytest.mark.exhaustive
def test_a_list_that_lost_a_model_is_synchronised_past_openclaws_refusal(
    registered: Registered, tmp_path: Path
) -> None:
    openclaw = OpenClaw(tmp_path / "home")
    config = registered.openclaw.config()
    provider = config["models"]["providers"]["claude-local"]
    wanted = list(provider["models"])
    provider["models"] = [{"id": "claude-2", "name": "Claude 2 (via CLI)"}, *wanted[2:]]
    openclaw.write(config)
    before = openclaw.file.read_bytes()

    ran = openclaw.run_any(
        [sys.executable, str(REPO / "ocp_connect.py"), "--sync", registered.url])

    assert ran.code == 0 and ran.stderr == "", ran
    assert openclaw.config()["models"]["providers"]["claude-local"]["models"] == wanted
    (copy,) = openclaw.file.parent.glob("openclaw.json.ocp-*")
    assert copy.read_bytes() == before


# ---------------------------------------------------------------------------
# Turns. They go on beside the gateways, and are looked at in the end
# ---------------------------------------------------------------------------

class Talk(NamedTuple):
    """What came of a few turns of one session."""
    turns: list[Ran]
    #: What the server's log says of each answer, and what its claude was asked.
    answers: list[Json]
    queries: list[Json]


def tool(command: str) -> dict[str, Json]:
    return {"tool": {"name": "exec", "input": {"command": command}}}


TALK = [[{"say": "Let me look."}, tool("echo one-$((40 + 2))"), tool("cat note.txt")],
        [{"say": "They say what they say."}], [{"say": "A second answer."}]]


def configured(registered: Registered, home: Path, url: str, **changes: Json) -> OpenClaw:
    """Another home with the same registration, for another server."""
    openclaw = OpenClaw(home)
    openclaw.file.write_text(
        registered.openclaw.file.read_text().replace(registered.url, url))
    config = openclaw.config()
    config["models"]["providers"]["claude-local"].update(changes)
    openclaw.write(config)
    return openclaw


def talk(registered: Registered, folder: Path, **changes: Json) -> Talk:
    """Two turns of a session, the first one with two tools."""
    scenario = {"turns": TALK, "shared": True, "repeat_last": False}
    with running_server(folder / "server", scenario) as server:
        openclaw = configured(registered, folder / "home", server.url, **changes)
        workspace = openclaw.home / ".openclaw/workspace"
        workspace.mkdir()
        (workspace / "note.txt").write_text("The word is cormorant.\n")
        turns = [openclaw.turn(QUESTION), openclaw.turn("And now?")]
        return Talk(turns, server.log_entries("answer_finished"), server.queries())


def talk_to_nobody(registered: Registered, folder: Path) -> Talk:
    """A turn when the server is down."""
    openclaw = configured(registered, folder / "home", f"http://127.0.0.1:{free_port()}")
    return Talk([openclaw.turn(QUESTION)], [], [])


@pytest.fixture(scope="module")
def talks(
    registered: Registered, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Talk]]]:
    def folder(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    jobs: dict[str, Callable[[], Talk]] = {
        # It tries again and again for more than a minute, mostly waiting.
        "down": lambda: talk_to_nobody(registered, folder("down")),
        "openai-completions": lambda: talk(registered, folder("openai")),
        # Only the other api takes a provider without a key.
        "anthropic-messages": lambda: talk(
            registered, folder("anthropic"), api="anthropic-messages", apiKey="any"),
    }
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}


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
        #: The buttons below each of them.
        self.buttons: list[Json] = []
        self.commands: list[str] = []
        self.number = 0
        self.is_polled = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # So a gateway hangs up that is killed.

    def ask(self, text: str, chat: int = 42, timeout_s: float = 180) -> str:
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
            bot.buttons.append(body.get("reply_markup"))
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


def command_line(pid: int) -> bytes:
    """How a process was started, empty for one that has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


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
            return http_call(self.proxy_port, "GET", "/health", timeout_s=20)
        except OSError:
            return None

    def proxies(self) -> list[int]:
        """The pids of the servers that the gateway has started."""
        found = {each.pid: each.parent for each in descendants(self.process.pid)
                 if b"ocp_server.py" in command_line(each.pid)}
        # What a server starts has its name for a moment.
        return [pid for pid, parent in found.items() if parent not in found]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(RUN_TIMEOUT_S)


@contextmanager
def running_gateway(
    openclaw: OpenClaw, telegram: Telegram, proxy_port: int, **config: Json
) -> Iterator[Gateway]:
    """A gateway with the plugin and these settings of it."""
    telegram.is_polled.clear()
    whole = openclaw.config()
    whole["plugins"]["entries"]["ocp"]["config"] = {
        "host": "127.0.0.1", "port": proxy_port, **config}
    whole["gateway"] = {"mode": "local", "port": free_port(),
                        "auth": {"mode": "token", "token": "any"}}
    whole["channels"] = {"telegram": {
        "enabled": True, "botToken": "99:any", "apiRoot": telegram.url,
        "dmPolicy": "allowlist", "allowFrom": ["42"],
        "groupPolicy": "open", "groups": {"*": {"requireMention": False}}}}
    openclaw.write(whole)
    gateway = Gateway(openclaw, proxy_port, telegram)
    try:
        assert telegram.is_polled.wait(RUN_TIMEOUT_S), gateway.log.read_text()
        yield gateway
    finally:
        end_group(gateway.process)


@pytest.fixture(scope="module")
def telegram() -> Iterator[Telegram]:
    bot = Telegram()
    with serving(bot):
        yield bot


class Keyed(NamedTuple):
    """A server with keys, and a home with the plugin that has one of them."""
    server: Server
    openclaw: OpenClaw
    key: str


ADMIN_KEY = "admin-0123456789abcdef"


def new_key(server: Server, name: str) -> str:
    reply = server.call("POST", "/api/keys", {"name": name},
                        {"Authorization": f"Bearer {ADMIN_KEY}"})
    assert reply.status == 201, reply
    return str(reply.json()["key"])


@pytest.fixture(scope="module")
def keyed(
    tmp_path_factory: pytest.TempPathFactory, bystander: Bystander, talks: object
) -> Iterator[Keyed]:
    # The turns are asked for to be under way.
    folder = tmp_path_factory.mktemp("keyed")
    openclaw = OpenClaw(folder / "home")
    openclaw.write(own_config(bystander))
    openclaw.good("plugins", "install", "--link", str(PLUGIN), "--force", "--accept-capabilities")
    env = {"OCP_ADMIN_KEY": ADMIN_KEY, "CLAUDE_AUTH_MODE": "multi"}
    with running_server(folder / "server", [[{"say": "A pelican."}]], env=env) as server:
        key = new_key(server, "first")
        openclaw.connect(server, "--key", key, "--primary")
        yield Keyed(server, openclaw, key)


@pytest.mark.exhaustive
def test_openclaw_finds_nothing_wrong_with_the_plugin(keyed: Keyed) -> None:
    found = json.loads(keyed.openclaw.good("plugins", "inspect", "ocp", "--runtime", "--json"))
    assert found["plugin"]["status"] == "loaded" and found["diagnostics"] == []
    assert found["commands"] == ["ocp"] and found["services"] == ["ocp-proxy"]
    assert "ocp" in found["plugin"]["providerIds"]
    assert "ocp" not in keyed.openclaw.good("plugins", "doctor").lower()


def typed_into(command: Sequence[str], env: Mapping[str, str], answers: Json) -> str:
    """What a program shows on a terminal where each of these questions is answered."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], list(command), {**env, "TERM": "xterm"})
    # Without a size it would show one character per line.
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    shown, left = b"", list(answers)
    deadline_s = time.monotonic() + RUN_TIMEOUT_S
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


@pytest.mark.exhaustive
def test_signing_in_by_the_other_name_writes_the_provider_and_fails_closed(
    keyed: Keyed, tmp_path: Path
) -> None:
    openclaw = keyed.openclaw.copied(tmp_path / "home")
    config = openclaw.config()
    config["plugins"]["entries"]["ocp"]["config"] = {"models": [SONNET, OPUS]}
    openclaw.write(config)

    command = openclaw.command(
        "models", "auth", "login", "--provider", "claude-max-proxy", "--method", "local",
        "--set-default")
    answers = [
        ("Host of the OCP", "\r"), ("Port", "\x7f" * 4 + f"{keyed.server.port}\r"),
        ("API key of", f"{keyed.key}\r"), ("Models to use", "\r"), ("Default model", "\r")]
    shown = typed_into(command, openclaw.env, answers)
    if answers[0][0] not in shown:
        # On a machine that is very busy OpenClaw was seen to end before its first question.
        shown = typed_into(command, openclaw.env, answers)

    config = openclaw.config()
    assert f"Default model set to ocp/{SONNET}" in shown, shown
    assert config["models"]["providers"]["ocp"]["baseUrl"] == f"{keyed.server.url}/v1"
    assert config["agents"]["defaults"]["model"] == {
        "primary": f"ocp/{SONNET}", "fallbacks": []}
    status = openclaw.good("models", "status")
    assert f"ocp/{SONNET}" in status and "Fallbacks (0)" in status
    assert keyed.key not in openclaw.file.read_text()


@pytest.fixture(scope="module")
def adopting(keyed: Keyed, telegram: Telegram) -> Iterator[Gateway]:
    """A gateway beside a server that runs already."""
    with running_gateway(
        keyed.openclaw, telegram, keyed.server.port, adminKey=ADMIN_KEY
    ) as gateway:
        yield gateway


@pytest.mark.exhaustive
def test_a_proxy_that_runs_already_is_adopted(adopting: Gateway) -> None:
    assert "None." in adopting.telegram.ask("/ocp sessions")
    assert "adopted" in adopting.log.read_text()
    assert adopting.proxies() == []


READING = ("status", "usage", "health", "models", "settings", "logs", "sessions", "keys",
           "version", "help")


@pytest.mark.exhaustive
def test_every_reading_command_is_answered_in_one_message(adopting: Gateway) -> None:
    for word in READING:
        said = adopting.telegram.ask(f"/ocp {word}")

        assert said.startswith("<b>") and "failed" not in said, said
        assert len(said) < 2000, (word, said)


@pytest.mark.exhaustive
def test_the_model_command_of_a_chat_lists_ours(adopting: Gateway) -> None:
    assert f"claude-local/{SONNET}" in adopting.telegram.ask("/model status")
    listed = adopting.telegram.ask("/models claude-local")
    assert f"{len(MODELS)} available" in listed
    shown = json.dumps(adopting.telegram.buttons[-1])
    # The buttons come in pages.
    assert sum(model["id"] in shown for model in MODELS) >= 5


@pytest.mark.exhaustive
def test_a_key_that_was_replaced_is_read_again_on_secrets_reload(
    adopting: Gateway, keyed: Keyed
) -> None:
    assert adopting.telegram.ask("Which bird?") == "A pelican."
    before = keyed.openclaw.file.read_bytes()
    second = new_key(keyed.server, "second")

    said = keyed.openclaw.connect(keyed.server, "--key", second)
    keyed.openclaw.good("secrets", "reload", "--token", "any")
    revoked = keyed.server.call(
        "DELETE", "/api/keys/first", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    assert revoked.json()["revoked"] is True

    assert "openclaw secrets reload" in said
    assert adopting.telegram.ask("And which now?") == "A pelican."
    assert keyed.openclaw.file.read_bytes() == before and b"ocp_" not in before


@pytest.mark.exhaustive
def test_thinking_can_be_switched_off(adopting: Gateway, keyed: Keyed) -> None:
    adopting.telegram.ask("/think off")

    assert adopting.telegram.ask("Which bird?") == "A pelican."

    assert keyed.server.queries()[-1]["thinking"] == 0


# Behind all others that ask a model there: OpenClaw leaves the key alone for ten minutes then.
@pytest.mark.exhaustive
def test_when_the_plan_is_used_up_nobody_else_is_asked(
    adopting: Gateway, keyed: Keyed, bystander: Bystander
) -> None:
    limit = {"api_error": {"status": 429, "word": "rate_limit", "text": "You've hit your limit"},
             "resets_at": int(time.time()) + 5000}
    keyed.server.write_scenario([[limit]])
    before, said_before = len(keyed.server.queries()), len(adopting.telegram.sent)

    adopting.telegram.ask("And which is the next one?")

    eventually(lambda: len(keyed.server.queries()) > before, 180)
    eventually(lambda: any(said.startswith("\N{WARNING SIGN}")
                           for said in adopting.telegram.sent[said_before:]), 180)
    assert len(keyed.server.queries()) == before + 1 and bystander.asked == []


@pytest.mark.exhaustive
def test_an_adopted_proxy_outlives_the_gateway(adopting: Gateway, keyed: Keyed) -> None:
    assert adopting.stop() == 0
    assert keyed.server.call("GET", "/health").status == 200


@pytest.mark.exhaustive
def test_the_gateway_starts_the_proxy_and_keeps_it_running(
    keyed: Keyed, telegram: Telegram, tmp_path: Path
) -> None:
    place = Place(tmp_path / "server")
    place.prepare()
    port = free_port()
    try:
        with running_gateway(
            keyed.openclaw, telegram, port, command=start_command(place), restartDelayMs=100
        ) as gateway:
            eventually(gateway.health, 180)
            assert "ocp" in telegram.commands
            assert "<b>OCP status</b>" in telegram.ask("/ocp status")
            assert "ocp_" in telegram.ask("/ocp keys add phone")
            assert "private chat" in telegram.ask("/ocp keys add other", chat=-100123)

            (crashing,) = gateway.proxies()
            os.kill(crashing, signal.SIGKILL)
            eventually(lambda: gateway.proxies() not in ([], [crashing]), 180)
            eventually(gateway.health, 180)

            assert "The proxy is back" in telegram.ask("/ocp restart")
            assert gateway.stop() == 0
            eventually(lambda: gateway.health() is None, 180)
        assert not place.fake_log.exists() or '"query"' not in place.fake_log.read_text()
    finally:
        kill_all(sorted(processes_with(place.folder)))


# ---------------------------------------------------------------------------
# Two profiles, each a tenant
# ---------------------------------------------------------------------------

NAMES = ("alice", "bob")


def profile_of(home: Path, name: str, bystander: Bystander) -> Path:
    """Make a profile that has a skill, a note and a variable of its own; its openclaw.json."""
    folder = home / f".openclaw-{name}"
    skill = folder / f"workspace/skills/{name}s-skill"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text(
        f"---\nname: {name}s-skill\ndescription: Knows the heron of {name}.\n---\nKnow it.\n")
    (folder / "workspace/note.txt").write_text(f"The note of {name}.\n")
    # Without its plugins it takes half of the time.
    config = {**own_config(bystander), "plugins": {"enabled": False},
              "env": {"vars": {"BIRD_OF_IT": f"gannet-of-{name}"}}}
    path = folder / "openclaw.json"
    path.write_text("// Mine.\n" + json.dumps(config, indent=1))
    return path


def tenants(openclaw: OpenClaw, server: Server, *words: str) -> None:
    """Run ocp_tenants.py; it has to go well."""
    env = {**openclaw.env, "OCP_HOME": str(server.ocp_home), "OCP_URL": server.url,
           "OCP_ADMIN_KEY": ADMIN_KEY, "OCP_DOCKER": "no-docker-here"}
    ran = run_to_end(
        [sys.executable, str(REPO / "ocp_tenants.py"), *words, "--yes"], env=env,
        cwd=openclaw.home, timeout_s=RUN_TIMEOUT_S)
    assert ran.code == 0, ran


def profile_turn(openclaw: OpenClaw, name: str) -> Ran:
    """A turn of a profile's agent, in a session whose id the other profile has too."""
    return openclaw.run(
        "--profile", name, "agent", "--local", "--session-id",
        "11111111-1111-4111-8111-111111111111", "--message", f"What does the note of {name} say?")


def usage_by_key(server: Server) -> dict[str, int]:
    """How many requests each key has made."""
    used = server.call("GET", "/api/usage?all=true", headers={
        "Authorization": f"Bearer {ADMIN_KEY}"})
    return {row["key_name"]: row["requests"] for row in used.json()["byKey"]}


@pytest.mark.exhaustive
def test_two_profiles_are_two_tenants_that_see_nothing_of_each_other(
    bystander: Bystander, tmp_path: Path
) -> None:
    openclaw = OpenClaw(tmp_path / "home")
    shutil.rmtree(openclaw.file.parent)
    files = {name: profile_of(openclaw.home, name, bystander) for name in NAMES}
    before = {name: file.read_bytes() for name, file in files.items()}
    scenario = [[tool("echo $BIRD_OF_IT; cat note.txt")], [{"say": "It says what it says."}]]
    env = {"OCP_ADMIN_KEY": ADMIN_KEY, "CLAUDE_AUTH_MODE": "multi"}
    with running_server(tmp_path / "server", scenario, env=env) as server:
        tenants(openclaw, server, "setup", "--primary", "--skip-answer")
        with ThreadPoolExecutor() as pool:
            turns = list(pool.map(lambda name: profile_turn(openclaw, name), NAMES))

        asked = [json.dumps(query) for query in server.queries()]
        for name, other, ran in zip(NAMES, reversed(NAMES), turns):
            assert ran.code == 0 and "It says what it says." in ran.stdout, ran
            own = [text for text in asked if f"The note of {name}." in text]
            for word in (f"{name}s-skill", f"the heron of {name}", f"gannet-of-{name}"):
                assert word in own[-1]
            assert other not in "".join(own)
        assert usage_by_key(server) == {"alice": 2, "bob": 2}

        changed = files["alice"].read_bytes()
        key = (server.ocp_home / "tenants/alice/key").read_text().strip()
        tenants(openclaw, server, "remove", "alice")
        tenants(openclaw, server, "undo", "bob")

        assert {name: file.read_bytes() for name, file in files.items()} == before
        models = server.call("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert models.status == 401
        if DEPTH == "all":
            # As of one that was not given its file back.
            files["alice"].write_bytes(changed)
            assert profile_turn(openclaw, "alice").code != 0
        assert len(server.queries()) == len(asked) and bystander.asked == []


# ---------------------------------------------------------------------------
# What came of the turns
# ---------------------------------------------------------------------------

apis = pytest.mark.parametrize("api", ["openai-completions", "anthropic-messages"])


@pytest.mark.exhaustive
@apis
def test_a_turn_runs_two_tools_and_goes_on(talks: dict[str, Future[Talk]], api: str) -> None:
    talked = talks[api].result()

    assert talked.turns[0].code == 0 and "They say what they say." in talked.turns[0].stdout
    reasons = [entry["stop_reason"] for entry in talked.answers[:2]]
    assert reasons == ["tool_use", "end_turn"]
    first, last = (json.dumps(query["messages"]) for query in talked.queries[:2])
    assert QUESTION in first and QUESTION in last
    assert "one-42" in last and "cormorant" in last


@pytest.mark.exhaustive
@apis
def test_a_conversation_goes_on_in_one_claude(talks: dict[str, Future[Talk]], api: str) -> None:
    talked = talks[api].result()

    assert [ran.code for ran in talked.turns] == [0, 0], talked.turns
    assert "A second answer." in talked.turns[1].stdout
    paths = [entry["path"] for entry in talked.answers]
    assert paths == ["fresh", "continued", "continued"]
    # Nothing that was said is said to it again.
    last = json.dumps(talked.queries[-1]["messages"])
    assert last.count(QUESTION) == 1 and last.count("They say what they say.") == 1


@pytest.mark.exhaustive
def test_when_the_server_is_down_nobody_else_is_asked(
    talks: dict[str, Future[Talk]], bystander: Bystander
) -> None:
    talked = talks["down"].result()

    assert talked.turns[0].code != 0, talked
    assert bystander.asked == []
