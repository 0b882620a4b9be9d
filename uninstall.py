#!/usr/bin/env python3
"""Removes the OCP service from this machine.

    python3 uninstall.py              show what goes, ask, remove it
    python3 uninstall.py --dry-run    only show
    python3 uninstall.py --purge      the data too: keys, usage, settings, logs

It reads ~/.ocp/install.json, in which the installer wrote down every step before taking it, and
walks it backwards: commands are taken back, files go, backups of what was there before return. A
file that was changed since is left alone. What is gone already is no error, and each step is
struck from the record once it is undone, so an interrupted run can be repeated. The folder with
the program itself stays.

Sections (search for "==== 3" to jump to the third):

     1. Small tools       commands, whole files, checksums, paths as people write them
     2. Steps back        one function for each kind of entry in the record
     3. Known services    what can be recognized without a record
     4. Data              the state folder, and when it may go
     5. Command line      what is to be undone, shown, confirmed, done
"""
from __future__ import annotations

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if os.name != "posix":
    sys.exit("OCP runs on Linux and macOS. On Windows, run this inside WSL.")

import argparse
import enum
import functools
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

#: A JSON object as the record has it.
Json = dict[str, Any]


class Exit(enum.IntEnum):
    """The exit codes."""

    #: Everything that was to go is gone, or was never there.
    OK = 0
    #: Something could not be undone; the record keeps it.
    FAILED = 1
    #: Nothing was done: wrong arguments, or nobody to ask.
    REFUSED = 2
    INTERRUPTED = 130


class Refused(Exception):
    """Why nothing is done, and what to do about it."""


class Stuck(Exception):
    """Why a step cannot be undone."""


# ==== 1. Small tools =========================================================
# Files are written whole or not at all. The names of drafts and backups are the installer's.

DRAFT = ".ocp-draft"
_COMMAND_TIMEOUT_S = 90

#: How service managers say that there is nothing to take back.
_ALREADY_GONE = re.compile(
    r"not loaded|does not exist|not found|no such|could not find|not currently loaded", re.I
)


def run(command: Iterable[str], environ: Mapping[str, str]) -> str:
    """Runs a command; "done" or "already gone". Raises Stuck."""
    words = list(command)
    try:
        done = subprocess.run(
            words, env={**environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="replace", timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise Stuck(f"no end after {_COMMAND_TIMEOUT_S} s") from None
    except OSError as problem:
        raise Stuck(f"{words[0]}: {problem.strerror}") from None
    complaint = (done.stderr or done.stdout).strip()
    if done.returncode == 0:
        return "done"
    # "Failed to connect to bus: No such file or directory" is about the manager, not the service.
    if _ALREADY_GONE.search(complaint) and "connect" not in complaint:
        return "already gone"
    raise Stuck(complaint or f"exit code {done.returncode}")


def write_whole(path: str, content: bytes) -> None:
    """The file has this content, for its owner only, or is untouched. Raises OSError."""
    draft = path + DRAFT
    remove_file(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def remove_file(path: str) -> bool:
    """Whether there was such a file; it is gone. Raises OSError."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_folder(path: str) -> str:
    """Removes a folder if it is empty; what became of it."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return "already gone"
    except OSError:
        return "kept: there is something in it"
    return "removed"


def checksum(path: str) -> Optional[str]:
    """What tells whether a file is still as it was written; None if there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def shown_path(path: str, home: str) -> str:
    """A path as people write it."""
    return "~" + path[len(home):] if path.startswith(home + os.sep) else path


# ==== 2. Steps back ==========================================================
# One function for each kind of entry. It undoes the entry and says what became of it; what is
# undone already is no error. KINDS is the table of them.


class Place(NamedTuple):
    """The session, and where things are."""

    environ: Mapping[str, str]
    home: str
    #: The folder of the record.
    folder: str
    purges: bool
    #: Whether to look for a service of the machine that no record tells of.
    is_system: bool

    @property
    def record_path(self) -> str:
        """The record of the installation."""
        return os.path.join(self.folder, "install.json")


def undo_run(entry: Json, place: Place) -> str:
    """Takes a command back."""
    return run(entry["undo"], place.environ)


def undo_make_dir(entry: Json, place: Place) -> str:
    """Removes a folder that has become empty."""
    return remove_folder(entry["path"])


def undo_write_file(entry: Json, place: Place) -> str:
    """Removes a file, or puts back what was there before it."""
    path, backup = str(entry["path"]), str(entry.get("backup") or "")
    found = checksum(path)
    has_backup = bool(backup) and os.path.lexists(backup)
    is_ours = found in entry["sha256"] or (entry.get("data") and place.purges)
    if found is not None and not is_ours:
        if has_backup and found == checksum(backup):
            # The installation was interrupted between the copy and the new file.
            remove_file(backup)
            return "kept: it was never changed"
        return "kept: it was changed since" + (f"; {backup} is what was there" * has_backup)
    if has_backup:
        os.replace(backup, path)
        outcome = "put back as it was before"
    else:
        outcome = "removed" if remove_file(path) else "already gone"
    if entry.get("then"):
        run(entry["then"], place.environ)
    return outcome


def clear_drafts(entries: Iterable[Json]) -> None:
    """Removes what an interruption left half written, whatever it was a draft of."""
    for entry in entries:
        for path in (entry.get("path"), entry.get("backup")):
            if path and entry["kind"] == "write_file":
                remove_file(path + DRAFT)


KINDS: dict[str, Callable[[Json, Place], str]] = {
    "run": undo_run,
    "make_dir": undo_make_dir,
    "write_file": undo_write_file,
}


def described(entry: Json, home: str) -> str:
    """One line for people; empty if there is nothing to undo."""
    if entry["kind"] == "run":
        return f"run {shlex.join(entry['undo'])}" if entry.get("undo") else ""
    return f"remove {shown_path(entry['path'], home)}"


def undone(entry: Json, place: Place) -> str:
    """Undoes an entry; what became of it. Raises Stuck."""
    try:
        return KINDS[entry["kind"]](entry, place)
    except OSError as problem:
        raise Stuck(problem.strerror or str(problem)) from None


# ==== 3. Known services ======================================================
# What can be recognized without a record: our own services, and those of the original, which
# are somebody else's work and therefore need a yes of their own.

#: (label, whether it is the original's)
KNOWN_UNITS = (
    ("ocp.service", False), ("ocp-proxy.service", True), ("openclaw-proxy.service", True),
)
KNOWN_AGENTS = (("dev.ocp.server", False), ("dev.ocp.proxy", True), ("ai.openclaw.proxy", True))


class KnownService(NamedTuple):
    """A service that is there."""

    label: str
    path: str
    is_legacy: bool
    #: How it ends, and how its manager forgets it.
    stop: tuple[tuple[str, ...], ...]
    reload: tuple[str, ...]


def _systemd_units(folder: str, base: tuple[str, ...]) -> Iterator[KnownService]:
    for label, is_legacy in KNOWN_UNITS:
        stop = (*base, "disable", "--now", label)
        path = os.path.join(folder, label)
        yield KnownService(label, path, is_legacy, (stop,), (*base, "daemon-reload"))


def _possible_services(place: Place, system: str) -> Iterator[KnownService]:
    if system != "Darwin":
        config = place.environ.get("XDG_CONFIG_HOME") or os.path.join(place.home, ".config")
        yield from _systemd_units(os.path.join(config, "systemd", "user"), ("systemctl", "--user"))
        if place.is_system:
            yield from _systemd_units("/etc/systemd/system", ("systemctl",))
        return
    for label, is_legacy in KNOWN_AGENTS:
        path = os.path.join(place.home, "Library", "LaunchAgents", f"{label}.plist")
        # On the screen or behind ssh: where it is not, it counts as gone.
        domains = (f"gui/{os.getuid()}", f"user/{os.getuid()}")
        stop = tuple(("launchctl", "bootout", f"{domain}/{label}") for domain in domains)
        yield KnownService(label, path, is_legacy, stop, ())


def known_services(place: Place, system: str) -> list[KnownService]:
    """The services that are there, recognized by the names of their files."""
    return [each for each in _possible_services(place, system) if os.path.lexists(each.path)]


def remove_service(service: KnownService, place: Place) -> str:
    """Stops a service and removes its file. Raises Stuck."""
    for command in service.stop:
        run(command, place.environ)
    try:
        remove_file(service.path)
    except OSError as problem:
        raise Stuck(problem.strerror or str(problem)) from None
    if service.reload:
        run(service.reload, place.environ)
    return "removed"


# ==== 4. Data ================================================================
# Keys, usage, settings and logs. They stay unless --purge says otherwise, and then only a folder
# goes that looks like ours and holds nobody's home.

_SIGNS = ("install.json", "install.json" + DRAFT, "ocp.env", "ocp.db", "logs", "admin-key")
#: Where a service of the machine keeps its own.
_SYSTEM_FOLDERS = ("/etc/ocp", "/var/lib/ocp")


def data_folders(record: Optional[Json], place: Place) -> list[str]:
    """The folders with data that exist, the record's own last."""
    system = _SYSTEM_FOLDERS if place.is_system else ()
    folders = [*system, str((record or {}).get("data_dir") or place.folder), place.folder]
    return [each for each in dict.fromkeys(folders) if os.path.isdir(each)]


def why_kept(folder: str, home: str) -> str:
    """Why a folder may not be removed with all that is in it, or an empty text."""
    real, real_home = os.path.realpath(folder), os.path.realpath(home)
    if os.path.commonpath([real, real_home]) == real:
        return "your home is in it"
    if os.path.islink(folder):
        return "it is a link; remove what it leads to by hand"
    names = os.listdir(folder)
    return "it does not look like a folder of OCP" if names and not set(names) & set(_SIGNS) else ""


def purge(folder: str) -> str:
    """Removes a folder with data; what became of it. Raises Stuck."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return "already gone"
    except OSError as problem:
        raise Stuck(problem.strerror or str(problem)) from None
    return "removed"


# ==== 5. Command line ========================================================
# What is to be undone, shown, confirmed, done.


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="uninstall.py",
        description="Removes the OCP service. Its data stays unless --purge is given.",
        epilog="Exit codes: 0 it is gone, 1 something could not be undone, 2 nothing was done.",
    )
    add = parser.add_argument
    add("--purge", action="store_true", help="remove keys, usage, settings and logs too")
    add("--legacy", action="store_true", help="remove services of the original OCP too")
    add("--system", action="store_true",
        help="look for a service of the machine too, if the record of it is lost (as root)")
    add("--dry-run", action="store_true", help="show what would go and change nothing")
    add("--yes", action="store_true", help="do not ask before acting")
    return parser


def this_place(environ: Mapping[str, str], options: argparse.Namespace) -> Place:
    """The session as it is. Raises Refused."""
    if options.system and os.getuid() != 0:
        raise Refused("--system needs root: run it with sudo.")
    home = os.path.abspath(environ.get("HOME") or os.path.expanduser("~"))
    runtime_dir = f"/run/user/{os.getuid()}"
    if "XDG_RUNTIME_DIR" not in environ and os.path.isdir(runtime_dir):
        # Shells of su and of some ssh servers lack it; systemctl --user needs it.
        environ = {**environ, "XDG_RUNTIME_DIR": runtime_dir}
    named = environ.get("OCP_HOME") or "~/.ocp"
    folder = os.path.join(home, named[2:]) if named.startswith("~/") else named
    return Place(environ, home, os.path.abspath(folder), options.purge, options.system)


def read_record(path: str) -> Optional[Json]:
    """The record of the installation. Raises Refused if it cannot be used."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read())
        known = record["version"] == 1 and all(e["kind"] in KINDS for e in record["actions"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{path} is damaged. Move it away, and run this again.") from None
    if not known:
        raise Refused(f"{path} was written by another version of OCP: use its uninstall.py.")
    return dict(record)


class Job(NamedTuple):
    """All that there is to remove."""

    place: Place
    record: Optional[Json]
    #: The entries to undo, last first.
    entries: list[Json]
    services: list[KnownService]
    legacy: list[KnownService]
    data: list[str]
    #: Folders that --purge does not dare to remove, and why.
    kept: list[str]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.record is None and not (self.services or self.legacy or self.data)


def prepare(place: Place, options: argparse.Namespace, system: str) -> Job:
    """Looks; changes nothing. Raises Refused."""
    record = read_record(place.record_path)
    entries = []
    for entry in reversed((record or {"actions": []})["actions"]):
        if place.purges or not entry.get("data"):
            entries.append(entry)
    recorded = {entry["path"] for entry in entries}
    known = [each for each in known_services(place, system) if each.path not in recorded]
    reasons = {each: why_kept(each, place.home) for each in data_folders(record, place)}
    return Job(
        place, record, entries,
        [each for each in known if not each.is_legacy],
        [each for each in known if each.is_legacy],
        [each for each in reasons if place.purges and not reasons[each]],
        [f"{each}: {reasons[each]}" for each in reasons if place.purges and reasons[each]],
    )


def show(job: Job, options: argparse.Namespace) -> None:
    """What goes, for people."""
    home = job.place.home
    print("This will be undone:")
    for line in filter(None, (described(entry, home) for entry in job.entries)):
        print(f"  {line}")
    for service in job.services:
        print(f"  remove the service {service.label} ({shown_path(service.path, home)})")
    for folder in job.data:
        print(f"  remove {shown_path(folder, home)} WITH ALL KEYS, USAGE, SETTINGS AND LOGS")
    for folder in job.kept:
        print(f"  keep {folder}")
    for service in job.legacy:
        more = "" if options.legacy else ", if you say so"
        print(f"  remove the original's service {service.label}{more}")
    sys.stdout.flush()


def asked(question: str) -> bool:
    """Whether the user says yes."""
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def confirmed(options: argparse.Namespace) -> bool:
    """Whether to go on. Raises Refused when there is nobody to ask."""
    if options.yes:
        return True
    # Whoever starts this may have closed it.
    if sys.stdin is None or not sys.stdin.isatty():
        raise Refused("There is no terminal to ask on: --yes goes on, --dry-run only shows.")
    return asked("Go on?")


def attempt(line: str, step: Callable[[], str]) -> bool:
    """Takes one step, and says what became of it; whether it is done."""
    try:
        print(f"  {line}: {step()}")
    except Stuck as problem:
        print(f"  {line}: FAILED: {problem}")
        return False
    finally:
        sys.stdout.flush()
    return True


def undo_all(job: Job) -> bool:
    """Undoes the record, striking each entry when it is undone; whether all went well."""
    record, place = job.record, job.place
    if record is None:
        return True
    left = list(record["actions"])
    clear_drafts(left)
    went_well = True
    for entry in job.entries:
        line = described(entry, place.home)
        if line and not attempt(line, functools.partial(undone, entry, place)):
            went_well = False
            continue
        left.remove(entry)
        write_whole(place.record_path, json.dumps({**record, "actions": left}).encode("ascii"))
    if went_well:
        remove_file(place.record_path + DRAFT)
        remove_file(place.record_path)
    return went_well


def remove_services(services: Iterable[KnownService], place: Place) -> bool:
    """Removes services that no record tells of; whether all went well."""
    went_well = True
    for service in services:
        step = functools.partial(remove_service, service, place)
        went_well = attempt(f"the service {service.label}", step) and went_well
    return went_well


def legacy_to_remove(job: Job, options: argparse.Namespace) -> list[KnownService]:
    """The services of the original that the user wants to be rid of."""
    if options.legacy:
        return job.legacy
    chosen = []
    for service in job.legacy:
        if not options.yes and asked(f"Remove the original's service {service.label} too?"):
            chosen.append(service)
        else:
            print(f"  the original's {service.label} stays; --legacy removes it")
    return chosen


def remove_data(job: Job) -> bool:
    """Removes the data if asked to, or empty folders; whether all went well."""
    place = job.place
    went_well = True
    for folder in job.data:
        step = functools.partial(purge, folder)
        went_well = attempt(f"remove {shown_path(folder, place.home)}", step) and went_well
    if os.path.isdir(place.folder) and remove_folder(place.folder) != "removed":
        print(f"  kept: {shown_path(place.folder, place.home)} with your settings, keys and usage" +
              ("" if place.purges else "; --purge removes it"))
    return went_well


def carry_out(job: Job, options: argparse.Namespace) -> Exit:
    """Shows, asks and removes. Raises Refused."""
    place = job.place
    if job.is_empty:
        kept = os.path.isdir(place.folder)
        print("Nothing of OCP's service is left here." + (
            f" Your data is in {shown_path(place.folder, place.home)}; --purge removes it."
            if kept else ""
        ))
        return Exit.OK
    show(job, options)
    if options.dry_run:
        print("Nothing was changed.")
        return Exit.OK
    if not confirmed(options):
        print("Nothing was changed.")
        return Exit.REFUSED
    legacy = legacy_to_remove(job, options)
    went_well = undo_all(job)
    went_well = remove_services([*job.services, *legacy], place) and went_well
    # A record of what could not be undone must not be lost with the data.
    went_well = went_well and remove_data(job)
    print("OCP's service is gone." if went_well else
          "Not everything could be undone. Run this again when the cause is mended.")
    return Exit.OK if went_well else Exit.FAILED


def main(arguments: list[str], environ: Mapping[str, str], system: str) -> int:
    """Runs the program; the exit code."""
    options = argument_parser().parse_args(arguments)
    try:
        place = this_place(environ, options)
        return carry_out(prepare(place, options, system), options)
    except Refused as problem:
        print(f"uninstall: {problem}", file=sys.stderr)
        return Exit.REFUSED
    except OSError as problem:
        print(f"uninstall: {problem}", file=sys.stderr)
        return Exit.FAILED
    except (KeyboardInterrupt, EOFError):
        print("\nuninstall: interrupted; run this again to go on.", file=sys.stderr)
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, platform.system()))
