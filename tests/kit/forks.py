"""Processes that run a script which they need not import: forks of a process that has done so.

To compile and import a script takes longer than most of what tests do with it. A `Forker` imports
one once, and each of its forks has arguments, environment, folder and output of its own. /proc
shows the command line and the environment of the forker, so tests that look there, and those of
how a script is started, start it as people do.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from processes import Ran
from project import clean_env

Json = Any


# ---------------------------------------------------------------------------
# In the process of the tests
# ---------------------------------------------------------------------------

class Forker:
    """A process that has imported a script. It ends with the process that has started it."""

    def __init__(self, script: Path) -> None:
        # Guards the pipes. Held for one request and its reply.
        self._lock = threading.Lock()
        # Whoever compiles a script keeps 40 MB of what that takes, and so would every fork.
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(script)], env=clean_env(),
                       check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", __file__, str(script)],
            env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True)

    def ask(self, **request: Json) -> Json:
        """Return the reply to one request; see `main`."""
        assert self._process.stdin and self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Let the process end. Forks that still run go on."""
        self._process.communicate()

    def fork(
        self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, stdout: Path,
        stderr: Path,
    ) -> Fork:
        """Run the script's `main` in a session of its own."""
        pid = self.ask(arguments=[*arguments], env=dict(env), folder=str(folder),
                       outputs=[str(stdout), str(stderr)])
        return Fork(self, pid)

    def run(
        self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, timeout_s: float
    ) -> Ran:
        """Run the script to its end. Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryDirectory() as outputs:
            stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
            fork = self.fork(arguments, env, folder, stdout, stderr)
            try:
                code = fork.wait(timeout_s)
            finally:
                fork.kill()
            return Ran(code, stdout.read_text(), stderr.read_text())


@functools.cache
def forker(script: Path) -> Forker:
    """Return the forker of this script, which is started on the first call."""
    started = Forker(script)
    atexit.register(started.close)
    return started


def wait_for_end(pid: int, timeout_s: float) -> None:
    """Return when a process has ended or the time is over. Without pidfd, as on macOS, return
    after 5 ms."""
    if not hasattr(os, "pidfd_open"):
        time.sleep(0.005)
        return
    # The number is still its own, because nobody has asked for its exit code.
    descriptor = os.pidfd_open(pid)
    try:
        select.select([descriptor], [], [], timeout_s)
    finally:
        os.close(descriptor)


class Fork:
    """A fork, with those methods of subprocess.Popen that tests use."""

    def __init__(self, parent: Forker, pid: int) -> None:
        self._parent = parent
        self.pid = pid
        self.returncode: Optional[int] = None

    def poll(self) -> Optional[int]:
        if self.returncode is None:
            self.returncode = self._parent.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline_s = time.monotonic() + timeout
        while True:
            code = self.poll()
            if code is not None:
                return code
            left_s = deadline_s - time.monotonic()
            if left_s < 0:
                raise subprocess.TimeoutExpired(repr(self), timeout)
            wait_for_end(self.pid, left_s)

    def send_signal(self, number: int) -> None:
        # Its number is nobody else's as long as nobody has asked for its exit code.
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---------------------------------------------------------------------------
# In the process that forks
# ---------------------------------------------------------------------------

def main(script: Path) -> int:
    """Answer requests, each a line of JSON, until there are no more. A fork returns from here with
    the exit code of the script.

    {"poll": pid} is answered with the exit code or null, what `become` takes with a pid."""
    sys.path.insert(0, str(script.parent))
    run = importlib.import_module(script.stem).main
    # A fork has no reason to look at what was there before it, which would copy that memory.
    gc.freeze()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "poll" in request:
            reply = exit_code(request["poll"])
        else:
            reply = os.fork()
            if reply == 0:
                become(script, **request)
                return int(run(*(sys.argv[1:], os.environ)[:run.__code__.co_argcount]))
        os.write(1, json.dumps(reply).encode() + b"\n")
    return 0


def exit_code(pid: int) -> Optional[int]:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become(
    script: Path, arguments: list[str], env: dict[str, str], folder: str, outputs: list[str]
) -> None:
    """Give this process what a program gets from whoever starts it."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    # The tests themselves may have been started by nohup or in the background of a script.
    for interrupt in (signal.SIGHUP, signal.SIGINT):
        signal.signal(interrupt, signal.SIG_DFL)
    sys.argv = [str(script), *arguments]
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    opened = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, new, 0o666) for path in outputs)]
    for number, descriptor in enumerate(opened):
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
