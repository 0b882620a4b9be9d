"""Stand-ins for systemctl, launchctl, loginctl and useradd: they record, and keep a little state.

Called as `fake_services.py NAME ARGUMENTS`, by scripts that FakeServices puts on a PATH. State is
in the folder $FAKE_SERVICES:
    calls.jsonl   every call, one list of words in a line
    enabled, active, lingers   one name in a line; a service is active once it was started
    unreachable   if it is there, the user's systemd is not
    headless      if it is there, nobody has logged in on the screen: launchd has no gui/UID
    domain        where launchd loaded the last agent
    fail          calls that contain this text fail
    kill          a call that contains this text kills the program that made it, and does nothing
    run           if it is there, starting a unit starts what it says, read as systemd reads it
    pid           of what was started
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import plistlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Optional

STATE = Path(os.environ.get("FAKE_SERVICES", "/nonexistent"))


# ---------------------------------------------------------------------------
# Reading units as systemd does
# ---------------------------------------------------------------------------

def systemd_words(line: str) -> list[str]:
    """The words of an ExecStart line: quotes, backslashes, then %% and $$."""
    words = re.findall(r'"((?:\\.|[^"\\])*)"|(\S+)', line)
    plain = [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in words]
    single = [re.sub(r"%(.)", lambda match: {"%": "%"}[match[1]], word) for word in plain]
    # A single dollar would be a variable.
    assert all(re.fullmatch(r"(?:[^$]|\$\$)*", word) for word in single[1:]), line
    return [single[0], *(word.replace("$$", "$") for word in single[1:])]


def systemd_file(value: str) -> str:
    """The one path that EnvironmentFile means: specifiers, then a pattern with backslashes."""
    pattern = re.sub(r"%(.)", lambda match: {"%": "%"}[match[1]], value)
    assert not re.search(r"(?<!\\)[*?\[{]", pattern), f"a pattern: {value}"
    return re.sub(r"\\(.)", r"\1", pattern)


def environment_file(text: str) -> dict[str, str]:
    """What systemd makes of a settings file of ours."""
    found = {}
    for line in text.split("\n"):
        name, equals, value = line.strip().partition("=")
        if not equals or name.startswith(("#", ";")):
            continue
        if value[:1] == '"':
            assert value[-1] == '"'
            value = re.sub(r'\\(["\\$`])', r"\1", value[1:-1])
        elif value[:1] == "'":
            value = value[1:-1]
        else:
            value = re.sub(r"\\(.)", r"\1", value)
        found[name] = value
    return found


def unit_command(path: Path) -> tuple[list[str], dict[str, str]]:
    """What a unit starts, and the environment that it gives."""
    fields = dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.M))
    env = environment_file(Path(systemd_file(fields["EnvironmentFile"])).read_text())
    return systemd_words(fields["ExecStart"]), env


# ---------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------

def names(kind: str) -> set[str]:
    file = STATE / kind
    return set(file.read_text().split("\n")) - {""} if file.exists() else set()


def put(kind: str, name: str, present: bool) -> None:
    kept = names(kind) - {name} | ({name} if present else set())
    (STATE / kind).write_text("\n".join(sorted(kept)))


def matches(kind: str, line: str) -> bool:
    file = STATE / kind
    return file.exists() and file.read_text() in line


def start(command: list[str], env: dict[str, str]) -> None:
    stop()
    base = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    with open(STATE / "output.txt", "ab") as output:
        process = subprocess.Popen(
            command, env={**base, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, cwd="/")
    (STATE / "pid").write_text(str(process.pid))


def stop() -> None:
    """End what was started, once it is gone."""
    file = STATE / "pid"
    if not file.exists():
        return
    pid = int(file.read_text())
    file.unlink()
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(6000):
            if not is_running(pid):
                return
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def is_running(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# ---------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------

def systemctl(words: list[str]) -> int:
    is_user = words[0] == "--user"
    verb, *rest = words[1:] if is_user else words
    label = rest[-1] if rest else ""
    folder = Path(os.environ["HOME"], ".config/systemd/user")
    if is_user and (STATE / "unreachable").exists():
        print("Failed to connect to bus: No such file or directory", file=sys.stderr)
        return 1
    if verb == "is-system-running":
        print("running")
    elif verb in ("is-enabled", "is-active"):
        return int(label not in names(verb[3:]))
    elif verb in ("enable", "disable"):
        if verb == "disable" and label not in names("enabled") | names("active"):
            print(f"Failed to disable unit: Unit file {label} does not exist.", file=sys.stderr)
            return 1
        put("enabled", label, verb == "enable")
        if "--now" in rest:
            put("active", label, verb == "enable")
            stop()
    elif verb == "restart":
        if (STATE / "run").exists():
            start(*unit_command(folder / label))
        put("active", label, True)
    return 0


def launchctl(words: list[str]) -> int:
    verb, target = words[0], words[1]
    label = target.rpartition("/")[2]
    domain = target if target.count("/") == 1 else target.rpartition("/")[0]
    if domain.startswith("gui/") and (STATE / "headless").exists():
        print("125: Domain does not support specified action", file=sys.stderr)
        return 125
    loaded = names("domain") or {f"gui/{domain.rpartition('/')[2]}"}
    is_loaded = label in names("active") and domain in loaded
    if verb == "print":
        # A domain is gui/UID, a service has one more part.
        return 0 if target == domain or is_loaded else 113
    if verb == "bootstrap":
        agent = plistlib.loads(Path(words[2]).read_bytes())
        session = "Aqua" if domain.startswith("gui/") else "Background"
        if agent.get("LimitLoadToSessionType", "Aqua") != session:
            print("Bootstrap failed: 5: Service cannot load in requested session",
                  file=sys.stderr)
            return 5
        (STATE / "domain").write_text(domain)
        put("active", agent["Label"], True)
        if (STATE / "run").exists():
            start(agent["ProgramArguments"], {})
    elif verb == "bootout":
        if not is_loaded:
            print("Boot-out failed: 3: No such process", file=sys.stderr)
            return 3
        put("active", label, False)
        stop()
    return 0


def loginctl(words: list[str]) -> int:
    verb, user = [word for word in words if not word.startswith("--")][:2]
    if verb == "show-user":
        print(f"Linger={'yes' if user in names('lingers') else 'no'}")
    else:
        put("lingers", user, verb == "enable-linger")
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "systemctl": systemctl, "launchctl": launchctl, "loginctl": loginctl,
    "useradd": lambda words: 0,
}


def main(name: str, words: list[str]) -> int:
    line = " ".join([name, *words])
    with open(STATE / "calls.jsonl", "a") as calls:
        calls.write(json.dumps([name, *words]) + "\n")
    if matches("kill", line):
        assert __name__ == "__main__", "only a program that was started may be killed"
        os.kill(os.getppid(), signal.SIGKILL)
        return 1
    if matches("fail", line):
        print("it was told to fail", file=sys.stderr)
        return 1
    return PROGRAMS[name](words)


# ---------------------------------------------------------------------------
# For the tests
# ---------------------------------------------------------------------------

class FakeServices:
    """The state of the stand-ins, and a folder of them for a PATH."""

    def __init__(self, folder: Path, programs: tuple[str, ...]) -> None:
        self.state = folder / "services"
        self.bin = folder / "bin"
        self.state.mkdir(parents=True)
        self.bin.mkdir()
        for name in programs:
            script = self.bin / name
            script.write_text(
                f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" '
                f'{name} "$@"\n')
            script.chmod(0o755)

    def set(self, name: str, text: Optional[str] = "") -> None:
        """Make one of the files of the state; None takes it away."""
        file = self.state / name
        if text is None:
            file.unlink()
        else:
            file.write_text(text)

    def get(self, name: str) -> set[str]:
        file = self.state / name
        return set(file.read_text().split("\n")) - {""} if file.exists() else set()

    def calls(self) -> list[str]:
        """Every call so far, as one line each."""
        file = self.state / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [" ".join(json.loads(line)) for line in lines]

    def answer(
        self, words: list[str], **options: object
    ) -> subprocess.CompletedProcess[str]:
        """What subprocess.run would say of a call, without a process. Any other program is
        content with whatever it is asked."""
        if words[0] not in PROGRAMS:
            return subprocess.CompletedProcess(words, 0, "", "")
        output, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(complaints):
            code = main(words[0], words[1:])
        return subprocess.CompletedProcess(
            words, code, output.getvalue(), complaints.getvalue())

    def stop(self) -> None:
        """End what is still running."""
        file = self.state / "pid"
        if file.exists():
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
