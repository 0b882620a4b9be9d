"""Disks that a test may fill up under a running program."""
from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import subprocess
from pathlib import Path
from typing import Protocol, Union


class Running(Protocol):
    """A program that runs."""

    @property
    def pid(self) -> int: ...


def may_mount() -> bool:
    """Whether this user may mount a small disk of their own."""
    if os.geteuid() != 0:
        return False
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


class SmallDisk:
    """A disk of 2 MB in memory, which can be filled up, or made read-only while nobody uses it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700)
        self._run("mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(folder))

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def fill(self, program: Running) -> None:
        file = os.open(self._folder / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(file, b"x" * 4_096)
        except OSError:
            pass  # Full.
        finally:
            os.close(file)

    def free(self, program: Running) -> None:
        (self._folder / "filler").unlink()

    def lock(self) -> None:
        self._run("mount", "-o", "remount,ro", str(self._folder))

    def close(self) -> None:
        self._run("umount", "--lazy", str(self._folder))


class ShortFiles:
    """Where no disk can be mounted: the program's files may not grow beyond their size.

    A reader keeps the write-ahead log from being begun anew, so that every row needs room."""

    def __init__(self, folder: Path, database: str = "ocp.db") -> None:
        self._path = folder / database
        self._reader: sqlite3.Connection | None = None

    def fill(self, program: Running) -> None:
        with contextlib.closing(sqlite3.connect(self._path)) as writer:
            self._reader = sqlite3.connect(self._path)
            self._reader.execute("BEGIN")
            self._reader.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            writer.execute("CREATE TABLE filler (text TEXT)")
            writer.execute("INSERT INTO filler VALUES (zeroblob(3000000))")
            writer.commit()
        resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))

    def free(self, program: Running) -> None:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(program.pid, resource.RLIMIT_FSIZE, unlimited)
        self.close()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


#: The kinds of disks that there are here.
DISKS: list[type[Union[ShortFiles, SmallDisk]]] = [
    ShortFiles, *([SmallDisk] if may_mount() else [])]
