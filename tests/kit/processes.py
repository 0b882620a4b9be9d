"""Processes of this machine: who is whose child, who lives, who is a zombie; and programs that
tests run to their end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Mapping, NamedTuple, Optional, Sequence


class Ran(NamedTuple):
    """How a program ended, and what it said."""
    code: int
    stdout: str
    stderr: str


class Process(NamedTuple):
    pid: int
    parent: int
    is_zombie: bool


def all_processes() -> list[Process]:
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        # The command is in brackets and may itself contain brackets and spaces.
        fields = of_process(pid, "stat").rpartition(b")")[2].split()
        if fields:
            found.append(Process(pid, int(fields[1]), fields[0] == b"Z"))
    return found


def of_process(pid: int, name: str) -> bytes:
    """What /proc says of a process; nothing if it has ended or belongs to somebody else."""
    # Tests read thousands of these, so without a buffer and without a Path.
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def descendants(pid: int) -> list[Process]:
    """The children of a process, their children, and so on; zombies too."""
    processes = all_processes()
    family = {pid}
    grown = True
    while grown:
        more = {each.pid for each in processes if each.parent in family} - family
        family |= more
        grown = bool(more)
    return [each for each in processes if each.pid in family and each.pid != pid]


def processes_with(folder: Path) -> set[int]:
    """The pids of all processes that were started with this folder in their environment."""
    needle = str(folder).encode() + b"/"
    pids = map(int, filter(str.isdecimal, os.listdir("/proc")))
    return {pid for pid in pids if needle in of_process(pid, "environ")} - {os.getpid()}


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that leads a session of its own, and all that it has started there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # All of it has ended.
    process.communicate()


def run_to_end(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path, timeout_s: float,
    stdin: Optional[str] = None,
) -> Ran:
    """Runs a program; whatever it has started ends with it. Without `stdin` it reads nothing."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        stdout, stderr = process.communicate(
            None if stdin is None else stdin.encode(), timeout=timeout_s)
    finally:
        end_group(process)
    return Ran(process.returncode, stdout.decode(), stderr.decode())


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even as a zombie."""
    return not os.path.exists(f"/proc/{pid}")


def is_dead(pid: int) -> bool:
    """Whether a process runs no more. Whoever inherited it may have left it as a zombie."""
    return pid not in [each.pid for each in all_processes() if not each.is_zombie]


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a process has had at any time."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def cpu_s(pid: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
