"""ocp_server.py alone: copied into an empty folder, on every Python there is, with nothing else.

What asks nothing of the start itself runs it compiled, since Python compiles a script each time.
"""
from __future__ import annotations

import ast
import base64
import functools
import hashlib
import itertools
import os
import py_compile
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from chat import CHAT_PATH, content_of, encoded, finish_reasons, pieces, question
from depth import by_depth
from http_client import Reply, http_call
from processes import kill_all, processes_with
from project import REPO, read_json_lines
from raw_http import RawConnection, post
from server import Place, output_of, wait_for_port
from waiting import eventually

Json = Any

#: Most tests start a server of their own, or several.
pytestmark = pytest.mark.slow

PYENV = Path.home() / ".pyenv" / "versions"
OLDEST, NEWEST = 9, 20


def pythons(minors: range) -> list[Any]:
    """A parameter for each Python 3 with one of these minor versions that is installed here."""
    found = []
    for minor in minors:
        name = f"python3.{minor}"
        places = [str(place) for place in sorted(PYENV.glob(f"3.{minor}.*/bin/python3"))]
        paths = [sys.executable] if sys.version_info[:2] == (3, minor) else places[-1:]
        path = paths[0] if paths else shutil.which(name)
        if path and works(path):
            found.append(pytest.param(path, id=name))
    return found


def works(path: str) -> bool:
    """Whether it starts: the shims of pyenv are there for versions that are not."""
    return subprocess.run([path, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0


def chosen_pythons() -> list[Any]:
    """The oldest, and all others where everything is run; the current one runs the other tests."""
    found = pythons(range(OLDEST, NEWEST))
    return by_depth(found[:1], found[:1], found)


each_python = pytest.mark.parametrize("python", chosen_pythons())


@functools.cache
def compiled_server() -> str:
    """The server as Python keeps it once it is compiled."""
    made = py_compile.compile(str(REPO / "ocp_server.py"), doraise=True)
    assert made
    return made


class Alone:
    """A folder with the script, beside an empty home. Another Python than this one gets the script
    as it is, which is also what `compiled` says."""

    def __init__(
        self, folder: Path, python: str = sys.executable, compiled: bool = True
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        is_compiled = compiled and python == sys.executable
        self.script = folder / "alone" / ("ocp_server.pyc" if is_compiled else "ocp_server.py")
        self.script.parent.mkdir(parents=True)
        self.home.mkdir()
        shutil.copy(compiled_server() if is_compiled else REPO / "ocp_server.py", self.script)
        self._python = python

    def command(self, *args: str) -> list[str]:
        return [self._python, "-I", "-S", str(self.script), *args]

    def env(self, more: Mapping[str, str]) -> dict[str, str]:
        # A PATH without claude; the system's own folders are needed by nobody.
        return {"HOME": str(self.home), "PATH": str(self.folder), **more}

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """The script, run to its end."""
        return subprocess.run(
            self.command(*args), env=self.env(env), cwd=self.script.parent, timeout=120,
            stdin=subprocess.DEVNULL, capture_output=True, text=True)

    @contextmanager
    def serving(self, *args: str, **env: str) -> Iterator[Serving]:
        """The script as a server on a free port."""
        place = Place(self.folder / "run")
        place.folder.mkdir()
        given = self.env({"CLAUDE_PROXY_PORT": "0", **env})
        with open(place.stdout, "wb") as stdout, open(place.stderr, "wb") as stderr:
            process = subprocess.Popen(
                self.command(*args), env=given, cwd=self.script.parent,
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        try:
            yield Serving(place, process, wait_for_port(place, process))
            process.terminate()
            assert process.wait(120) == 0, output_of(place)
        finally:
            process.kill()
            process.wait()
            kill_all(sorted(processes_with(self.folder)))


class Serving:
    """A server that was started alone."""

    def __init__(self, place: Place, process: subprocess.Popen[bytes], port: int) -> None:
        self.place = place
        self.process = process
        self.port = port

    @property
    def output(self) -> str:
        return output_of(self.place)

    def get(self, path: str) -> Json:
        return http_call(self.port, "GET", path).json()

    def ask(self, text: str, **fields: Json) -> Reply:
        return http_call(self.port, "POST", CHAT_PATH, question(text, **fields))


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    return Alone(tmp_path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running demo for all tests that leave it as it is."""
    with Alone(tmp_path_factory.mktemp("demo")).serving("--demo") as running:
        yield running


@pytest.mark.exhaustive
def test_it_serves_out_of_an_archive_too(alone: Alone) -> None:
    archive = alone.script.with_name("ocp.zip")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(alone.script, "__main__.pyc")
    alone.script = archive

    with alone.serving("--demo") as running:
        assert "You wrote: hello" in content_of(running.ask("hello"))
        assert http_call(running.port, "GET", "/dashboard").status == 200


# ---------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------

@pytest.mark.exhaustive
@each_python
def test_the_demo_answers_word_by_word_on_every_python(tmp_path: Path, python: str) -> None:
    with Alone(tmp_path, python).serving("--demo") as demo:
        started_s = time.monotonic()
        reply = demo.ask("one two", stream=True)
        taken_s = time.monotonic() - started_s
        demo_health = demo.get("/health")
        demo_models = demo.get("/v1/models")["data"]

        words = pieces(reply.events)
        assert len(words) > 10 and all(re.fullmatch(r"\S+\s?", word) for word in words)
        assert taken_s > 0.02 * len(words)
        assert finish_reasons(reply.events) == ["stop"] and reply.events[-1][1] == "[DONE]"
        assert "demo" in "".join(words) and "one two" in "".join(words)
        assert (demo_health["status"], demo_health["demo"]) == ("ok", True)
        assert len(demo_models) >= 7
        assert "Traceback" not in demo.output and "Warning" not in demo.output


@pytest.mark.exhaustive
def test_the_demo_answers_one_question_after_the_other_in_the_same_processes(demo: Serving) -> None:
    # More than may be parked on any machine.
    answers = [content_of(demo.ask(f"Number {number}")) for number in range(12)]

    assert all(f"Number {number}" in answer for number, answer in enumerate(answers))
    assert demo.get("/health")["stats"]["rewound"] >= 2


@pytest.mark.exhaustive
def test_the_demo_says_what_it_is_everywhere(demo: Serving) -> None:
    answer = content_of(demo.ask("hello"))
    started = eventually(lambda: [
        entry for entry in demo.get("/logs?n=1000")["entries"]
        if entry["event"] == "server_started"])

    assert "demo" in answer and "no model was asked" in answer
    assert "DEMO" in demo.output and f"http://127.0.0.1:{demo.port}/v1" in demo.output
    assert demo.get("/health")["demo"] is True
    assert started[0]["demo"] is True


def test_the_curl_line_of_the_banner_works_as_it_stands(demo: Serving) -> None:
    (line,) = [line for line in demo.output.splitlines() if line.strip().startswith("curl")]

    curl, url, option, body = shlex.split(line)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    target = urlsplit(url)
    reply = http_call(target.port or 0, "POST", target.path, body, form)

    assert (curl, option) == ("curl", "-d")
    assert "demo" in content_of(reply)


def test_the_demo_keeps_a_limit_and_a_history(demo: Serving) -> None:
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "second"},
                {"role": "user", "content": "third"}]

    cut = demo.ask("hello", max_tokens=3).json()["choices"][0]
    last = content_of(demo.ask("", messages=messages))

    assert (len(cut["message"]["content"].split()), cut["finish_reason"]) == (3, "length")
    assert "third" in last and "first" not in last


@pytest.mark.exhaustive
def test_the_demo_ends_an_answer_at_the_first_stop_sequence(demo: Serving) -> None:
    stopped = demo.ask("hello", stop=["account", "no model"]).json()["choices"][0]
    both = [demo.ask("hello", stop=["no model"], max_tokens=count).json()["choices"][0]
            for count in (2, 99)]
    other = demo.ask("hello", stop=["nothing of the answer"]).json()["choices"][0]

    assert stopped["message"]["content"] == "This is the demo of OCP: "
    assert [each["finish_reason"] for each in (stopped, *both, other)] == [
        "stop", "length", "stop", "stop"]
    assert other["message"]["content"].endswith("hello")


def test_the_demo_has_a_history_and_a_plan_to_look_at(demo: Serving) -> None:
    usage = demo.get("/api/usage?all=true&hours=720")
    plan = demo.get("/usage")["plan"]

    assert len(usage["byKey"]) >= 4 and len(usage["byModel"]) >= 3 and len(usage["daily"]) >= 28
    assert 0 < usage["totals"]["errors"] < usage["totals"]["requests"] / 10
    assert plan["currentSession"]["utilization"] and plan["weeklyLimits"]["allModels"]["resetsAt"]
    assert {key["name"] for key in demo.get("/api/keys")["keys"]} >= {"laptop", "desktop"}
    errors = demo.get("/api/errors?since=30d")
    assert len(errors["byKind"]) >= 4 and all(row["action"] for row in errors["byKind"])
    assert all("made up" in row["message"] for row in errors["errors"])


def test_a_browser_is_led_to_the_dashboard_and_a_program_told_what_is_here(demo: Serving) -> None:
    browser = http_call(demo.port, "GET", "/", headers={"Accept": "text/html,*/*;q=0.8"})
    program = http_call(demo.port, "GET", "/")

    assert (browser.status, browser.headers["Location"], browser.text) == (302, "dashboard", "")
    assert program.status == 200 and len(program.text.splitlines()) == 3
    assert all(path in program.text for path in ("/v1", "/health", "/openapi.json", "/dashboard"))


def test_the_client_set_up_is_not_there_and_says_where_it_belongs(demo: Serving) -> None:
    reply = http_call(demo.port, "GET", "/connect")

    assert reply.status == 404
    message = reply.json()["error"]["message"]
    assert "beside this server's ocp_server.py" in message and "python3 ocp_connect.py" in message


@pytest.mark.parametrize("path, file", [("/dashboard", "dashboard.html"), ("/me", "me.html")])
def test_a_page_is_not_there_and_says_where_it_belongs(
    demo: Serving, path: str, file: str
) -> None:
    reply = http_call(demo.port, "GET", path)

    assert reply.status == 200
    assert f"There is no {file} beside this server's ocp_server.py" in reply.text
    assert 'fetch("health")' in reply.text
    script = reply.text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in reply.headers["Content-Security-Policy"]


def test_a_client_that_leaves_the_demo_frees_its_place(demo: Serving) -> None:
    with RawConnection(demo.port) as wire:
        # To the end it would take a minute.
        wire.send(post(encoded(question("hello " * 2000, stream=True))))
        wire.status_line()

    assert eventually(lambda: demo.get("/health")["concurrency"]["inflight"] == 0)


@pytest.mark.exhaustive
def test_a_killed_demo_leaves_no_process(alone: Alone) -> None:
    with alone.serving("--demo") as demo:
        demo.ask("hello")
        demo.process.send_signal(signal.SIGKILL)
        demo.process.wait()

        assert eventually(lambda: not processes_with(alone.folder))
        demo.process.returncode = 0


def test_what_is_kept_lies_below_the_home_and_is_private(tmp_path: Path) -> None:
    alone = Alone(tmp_path, compiled=False)
    with alone.serving("--demo") as demo:
        demo.ask("hello")

    log = alone.home / ".ocp" / "demo" / "logs" / "ocp.log"
    assert [entry["event"] for entry in read_json_lines(log)][0] == "server_started"
    assert (alone.home / ".ocp").stat().st_mode & 0o077 == 0
    assert sorted(os.listdir(alone.home)) == [".ocp"]
    assert sorted(os.listdir(alone.script.parent)) == ["ocp_server.py"]


# ---------------------------------------------------------------------------
# Commands that end
# ---------------------------------------------------------------------------

@each_python
def test_a_check_of_the_demo_is_fine_on_every_python(tmp_path: Path, python: str) -> None:
    done = Alone(tmp_path, python).run("--check", "--demo")

    assert (done.returncode, done.stderr) == (0, "")
    assert "all good" in done.stdout


#: Runs a script on an interpreter that says it is older than it is.
PRETENDING = """
import runpy, sys
sys.version_info, sys.version = (3, 8, 18, "final", 0), "3.8.18 (pretended)"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.exhaustive
def test_python_3_6_which_cannot_read_the_scripts_shows_what_is_needed() -> None:
    """It prints the line that it cannot read, which is the first one after the docstring."""
    scripts = sorted(REPO.glob("*.py"))
    for script in scripts:
        source = script.read_text("utf-8")
        line = source.splitlines()[ast.parse(source).body[1].lineno - 1]
        assert line.startswith("from __future__ import annotations  # OCP needs Python 3.9"), script
    for python, script in itertools.product(pythons(range(6, 7)), scripts):
        done = subprocess.run(
            [*python.values, str(script)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "OCP needs Python 3.9 or later" in done.stderr, script


def assert_told_what_is_needed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert re.search(r"needs Python 3\.9 or later; this is Python 3\.\d", done.stderr)
    assert "Traceback" not in done.stderr


def test_an_older_python_is_told_what_is_needed(tmp_path: Path) -> None:
    alone = Alone(tmp_path / "pretended", compiled=False)
    assert_told_what_is_needed(subprocess.run(
        [sys.executable, "-c", PRETENDING, str(alone.script), "--version"], text=True,
        capture_output=True, timeout=120))
    for number, python in enumerate(pythons(range(7, OLDEST))):
        assert_told_what_is_needed(
            Alone(tmp_path / str(number), *python.values).run("--version"))


def test_a_check_without_claude_says_how_to_get_it(alone: Alone) -> None:
    done = alone.run("--check", CLAUDE_BIN=str(alone.folder / "nothing"))

    assert done.returncode == 2
    assert "npm install -g @anthropic-ai/claude-code" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_check_fails_where_the_server_could_not_listen(alone: Alone) -> None:
    # An address of the documentation, which no machine has.
    done = alone.run("--check", "--demo", CLAUDE_BIND="192.0.2.1", PROXY_API_KEY="k" * 40,
                     CLAUDE_AUTH_MODE="shared")

    assert done.returncode == 2
    assert "cannot listen on 192.0.2.1" in done.stderr
    assert "has to be an address of this machine" in done.stderr


def test_a_check_passes_beside_a_running_server(alone: Alone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = alone.run("--check", "--demo", CLAUDE_PROXY_PORT=str(listener.getsockname()[1]))

    assert done.returncode == 0, done.stderr


def test_a_check_names_every_bad_setting_at_once(alone: Alone) -> None:
    done = alone.run("--check", "--demo", CLAUDE_PROXY_PORT="http", CLAUDE_TIMEOUT="5",
                     CLAUDE_AUTH_MODE="open", CLAUDE_IMAGE_ALLOW_URL="maybe")

    assert done.returncode == 2
    for name in ("CLAUDE_PROXY_PORT", "CLAUDE_TIMEOUT", "CLAUDE_AUTH_MODE",
                 "CLAUDE_IMAGE_ALLOW_URL"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.few_cases
@pytest.mark.parametrize(("env", "words"), [
    ({"CLAUDE_AUTH_MODE": "shared"}, "PROXY_API_KEY"),
    ({"CLAUDE_AUTH_MODE": "none", "PROXY_API_KEY": "long-secret"}, "PROXY_API_KEY"),
    ({"OCP_DEFAULT_MODEL": "gpt-9"}, "OCP_DEFAULT_MODEL"),
    ({"CLAUDE_MAX_CONCURRENT": "0"}, "from 1 to 64"),
])
def test_a_setting_that_cannot_be_used_stops_the_start(
    alone: Alone, env: dict[str, str], words: str
) -> None:
    checked, started = alone.run("--check", "--demo", **env), alone.run("--demo", **env)

    assert checked.returncode == started.returncode == 2
    assert words in checked.stderr and words in started.stderr
    assert "long-secret" not in checked.stderr + checked.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_claude_that_would_ask_this_server_stops_the_start(alone: Alone, host: str) -> None:
    if host == "[::1]" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    loop = {"ANTHROPIC_BASE_URL": f"http://{host}:3999", "CLAUDE_PROXY_PORT": "3999"}
    done = alone.run("--check", "--demo", OCP_PASS_ENV="ANTHROPIC_BASE_URL", **loop)
    assert done.returncode == 2 and "leads back to this server" in done.stderr
    # It does not reach claude unless it is named, and another port is another server.
    assert alone.run("--check", "--demo", **loop).returncode == 0
    other = {**loop, "CLAUDE_PROXY_PORT": "3998"}
    assert alone.run("--check", "--demo", OCP_PASS_ENV="ANTHROPIC_*", **other).returncode == 0


def test_a_setting_that_is_gone_is_named_with_the_reason(alone: Alone) -> None:
    done = alone.run("--check", "--demo", CLAUDE_TUI_MODE="1")

    assert done.returncode == 0
    assert "CLAUDE_TUI_MODE has no effect" in done.stdout


@pytest.mark.parametrize(("name", "meant"), [
    ("CLAUDE_MAX_CONCURENT", "CLAUDE_MAX_CONCURRENT"), ("OCP_PORT", "CLAUDE_PROXY_PORT"),
    ("OCP_FOO", ""),
])
def test_a_check_names_what_is_no_setting(alone: Alone, name: str, meant: str) -> None:
    done = alone.run("--check", "--demo", CLAUDE_CODE_MAX_RETRIES="3", **{name: "3"})

    advice = f"ATTENTION: {name} is not a setting." + (f" Did you mean {meant}?" if meant else "")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if "ATTENTION" in line] == [advice]


@pytest.mark.exhaustive
def test_a_start_logs_what_is_no_setting(alone: Alone) -> None:
    with alone.serving("--demo", OCP_WARM_PROCESES="3", OCP_URL="http://127.0.0.1:1") as demo:
        logged = [entry for entry in demo.get("/logs?level=warn")["entries"]
                  if entry["event"] == "setting_unknown"]

    assert [(entry["setting"], entry["did_you_mean"]) for entry in logged] == [
        ("OCP_WARM_PROCESES", "OCP_WARM_PROCESSES")]


def claude_with(alone: Alone, status: str) -> str:
    """A claude that tells its version and this state of its login, and nothing else."""
    path = alone.folder / "claude"
    path.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "2.1.329 (Claude Code)"; exit; fi\n'
        f"echo '{status}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("status", "words"), [
    ('{"loggedIn": true}', "login: logged in\nall good\n"),
    ('{"loggedIn": false}', "login: not logged in: run `claude auth login` as this user\n"
     "all good, but for the login\n"),
    ("what?", "login: not known yet: the first answer tells\nall good\n"),
])
def test_a_check_says_what_is_known_of_the_login(alone: Alone, status: str, words: str) -> None:
    done = alone.run("--check", CLAUDE_BIN=claude_with(alone, status))

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(words)
    assert os.listdir(alone.home) == []


def test_options_win_over_the_environment(alone: Alone) -> None:
    done = alone.run("--check", "--demo", "--port", "4001", "--host", "127.0.0.2",
                     CLAUDE_PROXY_PORT="4002", CLAUDE_BIND="127.0.0.3")

    assert "listens on 127.0.0.2 port 4001" in done.stdout
    assert "CLAUDE_PROXY_PORT=4001 (from --port)" in done.stdout


def test_a_port_that_is_none_stops_the_start(alone: Alone) -> None:
    done = alone.run("--check", "--demo", "--port", "http")

    assert done.returncode == 2 and "CLAUDE_PROXY_PORT: 'http'" in done.stderr


# ---------------------------------------------------------------------------
# The settings file
# ---------------------------------------------------------------------------

def with_settings_file(alone: Alone, text: str) -> Path:
    """Write the file as the installer does."""
    path = alone.home / ".ocp" / "ocp.env"
    path.parent.mkdir(mode=0o700)
    path.write_text(text)
    return path


def test_a_start_by_hand_means_the_server_that_was_installed(alone: Alone) -> None:
    with_settings_file(
        alone, '# A comment\nCLAUDE_AUTH_MODE=multi\nOCP_INSTANCE_NAME="the \\"attic\\""\n')
    with alone.serving(CLAUDE_BIN=claude_with(alone, "{}")) as server:
        state = server.get("/health")

    assert (state["authMode"], state["instanceName"]) == ("multi", 'the "attic"')


def test_a_check_says_where_each_value_comes_from(alone: Alone) -> None:
    path = with_settings_file(
        alone, "CLAUDE_BIND=127.0.0.2\nCLAUDE_PROXY_PORT=4002\nPROXY_API_KEY=a-long-secret\n")
    done = alone.run("--check", CLAUDE_BIND="127.0.0.3", CLAUDE_BIN=claude_with(alone, "{}"))
    printed = alone.run("--print-settings", CLAUDE_BIND="127.0.0.3")

    assert f"reads settings from {path}\n" in done.stdout
    assert f"CLAUDE_PROXY_PORT=4002 (from {path})" in done.stdout
    assert "CLAUDE_BIND=127.0.0.3 (from environment)" in done.stdout
    assert f"PROXY_API_KEY=(secret) (from {path})" in done.stdout
    assert f"- `CLAUDE_PROXY_PORT=4002` from {path}" in printed.stdout
    assert "a-long-secret" not in done.stdout + printed.stdout


@pytest.mark.exhaustive
def test_a_demo_reads_no_settings_file_and_leaves_real_data_alone(alone: Alone) -> None:
    path = with_settings_file(alone, "CLAUDE_AUTH_MODE=multi\n")
    with alone.serving("--demo") as demo:
        demo.ask("hello")
        assert demo.get("/health")["authMode"] == "none"

    assert sorted(os.listdir(path.parent)) == ["demo", "ocp.env"]
    assert sorted(os.listdir(path.parent / "demo")) == ["claude", "logs", "server.lock"]


def test_a_wrong_value_in_the_settings_file_is_told_with_the_file(alone: Alone) -> None:
    path = with_settings_file(alone, "CLAUDE_TIMEOUT=soon\n")

    done = alone.run()

    assert done.returncode == 2
    assert "CLAUDE_TIMEOUT: 'soon'" in done.stderr and f"read from {path} too" in done.stderr


def test_a_settings_file_that_cannot_be_read_stops_the_start(alone: Alone) -> None:
    # A folder stops the superuser as well.
    path = alone.home / ".ocp" / "ocp.env"
    path.mkdir(parents=True)

    done = alone.run("--check")

    assert done.returncode == 2 and f"{path} cannot be read" in done.stderr


@pytest.mark.parametrize("line", [
    "CLAUDE_AUTH_MODE multi", "export CLAUDE_AUTH_MODE=multi", "CLAUDE_AUTH_MODE = multi",
    "\ufeffCLAUDE_AUTH_MODE=multi"])
def test_a_line_of_the_settings_file_that_sets_nothing_stops_the_start(
    alone: Alone, line: str,
) -> None:
    path = with_settings_file(
        alone, f"# a comment\n\n; another\n  CLAUDE_BIND=127.0.0.1\n{line}\n")

    done = alone.run("--check")

    assert done.returncode == 2, done
    assert f"{path}, line 5: write NAME=VALUE" in done.stderr
    assert "multi" not in done.stderr, "the line may contain a secret"


def test_a_check_touches_nothing(alone: Alone) -> None:
    alone.run("--check", "--demo")

    assert os.listdir(alone.home) == []


def test_the_settings_are_printed_as_a_table(alone: Alone) -> None:
    done = alone.run("--print-settings")

    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows) > 25 and all(row.count("|") == 6 for row in rows)
    assert any(row.startswith("| `CLAUDE_PROXY_PORT` | 3456 |") for row in rows)


def test_the_check_says_what_follows_the_memory_and_not_what_is_set(alone: Alone) -> None:
    done = alone.run("--check", "--demo", OCP_PARKED_PROCESSES="3")

    assert re.search(r"^OCP_WARM_TOTAL=[1-4] \(from memory, [0-9.]+ GB\)$", done.stdout,
                     re.MULTILINE)
    assert "OCP_PARKED_PROCESSES=3 (from environment)" in done.stdout


def test_the_version_and_the_help_are_printed(alone: Alone) -> None:
    version, shown_help = alone.run("--version"), alone.run("--help")

    assert version.returncode == shown_help.returncode == 0
    assert re.fullmatch(r"ocp \d+\.\d+\.\d+\n", version.stdout)
    for option in ("--demo", "--check", "--print-settings", "--port N", "--host ADDR"):
        assert option in shown_help.stdout


def test_an_unknown_option_is_refused(alone: Alone) -> None:
    done = alone.run("--dmeo")

    assert done.returncode == 2 and "--dmeo" in done.stderr


# ---------------------------------------------------------------------------
# Starts that cannot be perfect
# ---------------------------------------------------------------------------

def test_a_port_that_is_taken_stops_the_start_with_a_clear_sentence(alone: Alone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = alone.run("--demo", CLAUDE_PROXY_PORT=str(port))

    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "CLAUDE_PROXY_PORT" in done.stderr and "Traceback" not in done.stderr
    assert not processes_with(alone.folder)


def test_an_address_that_does_not_exist_stops_the_start(alone: Alone) -> None:
    done = alone.run("--demo", CLAUDE_PROXY_PORT="0", CLAUDE_BIND="192.0.2.1")

    assert done.returncode == 1
    assert "cannot listen on 192.0.2.1" in done.stderr and "Traceback" not in done.stderr
    assert "CLAUDE_BIND" in done.stderr and "already" not in done.stderr


@pytest.mark.exhaustive
def test_a_home_that_cannot_be_written_is_a_warning_and_no_more(alone: Alone) -> None:
    # A file where a folder should be stops the superuser as well.
    (alone.folder / "file").write_text("")

    with alone.serving("--demo", OCP_HOME=str(alone.folder / "file" / "ocp")) as demo:
        answer = content_of(demo.ask("hello"))
        warnings = [entry["event"] for entry in demo.get("/logs?level=warn")["entries"]]

        assert "demo" in answer
        assert "home_not_writable" in warnings
        assert "OCP_HOME" in demo.output


def test_a_server_without_claude_starts_and_says_what_to_do(alone: Alone) -> None:
    with alone.serving(CLAUDE_BIN=str(alone.folder / "nothing")) as server:
        state = server.get("/health")

        assert (state["status"], state["claudeBinaryOk"]) == ("degraded", False)
        assert "npm install" in state["fix"]
        eventually(lambda: "npm install" in server.output)
        assert "curl" not in server.output


@pytest.mark.exhaustive
def test_the_banner_of_a_server_with_keys_has_a_command_that_works(alone: Alone) -> None:
    with alone.serving(
        "--demo", CLAUDE_BIND="0.0.0.0", CLAUDE_AUTH_MODE="multi", PATH=os.environ["PATH"]
    ) as demo:
        command = eventually(lambda: re.findall(r"^  (curl .*)$", demo.output, re.MULTILINE))[0]
        done = subprocess.run(
            ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)

        assert "demo" in done.stdout, done
        assert f"Dashboard: http://127.0.0.1:{demo.port}/dashboard, with the key in " in demo.output
        assert re.search(r"^Other devices: ", demo.output, re.MULTILINE)


@pytest.mark.exhaustive
def test_the_banner_has_no_command_where_none_would_work(alone: Alone) -> None:
    with alone.serving("--demo", CLAUDE_AUTH_MODE="multi", OCP_ADMIN_KEY="only-mine") as demo:
        eventually(lambda: "with OCP_ADMIN_KEY" in demo.output)
        assert "curl" not in demo.output and "Other devices" not in demo.output


@pytest.mark.exhaustive
def test_whoever_opens_the_server_to_all_is_warned(alone: Alone) -> None:
    with alone.serving("--demo", CLAUDE_BIND="0.0.0.0") as demo:
        assert "ATTENTION" in demo.output and "PROXY_API_KEY" in demo.output
    shutil.rmtree(alone.folder / "run")
    with alone.serving("--demo", CLAUDE_BIND="0.0.0.0", PROXY_API_KEY="a-key") as demo:
        assert "ATTENTION" not in demo.output


@pytest.mark.exhaustive
def test_a_models_file_beside_the_script_is_used(alone: Alone) -> None:
    text = (REPO / "models.json").read_text().replace("Claude Opus 5.5", "Claude Opus Five")
    (alone.script.parent / "models.json").write_text(text)

    with alone.serving("--demo") as demo:
        assert demo.get("/v1/models/opus")["display_name"] == "Claude Opus Five"


@pytest.mark.exhaustive
def test_a_models_file_that_is_broken_stops_the_start(alone: Alone) -> None:
    (alone.script.parent / "models.json").write_text('{"models": []')

    done = alone.run("--demo")

    assert done.returncode == 2
    assert "models.json" in done.stderr and "Traceback" not in done.stderr
