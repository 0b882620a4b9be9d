#!/usr/bin/env python3
"""Removes the OCP service from this machine.

    python3 uninstall.py              show what goes, ask, remove it
    python3 uninstall.py --dry-run    only show
    python3 uninstall.py --purge      the data too: keys, usage, settings, logs

It reads ~/.ocp/install.json, in which the installer wrote down every step before it performed it,
and undoes the steps in reverse order: commands are undone, files are removed, backups of what was
there before return. A file that was changed since is left alone. What is gone already is not an
error, and each step is removed from the record once it is undone, so an interrupted run can be
repeated. The folder with the program itself stays.

Sections (search for "==== 3" to jump to the third):

     1. Shared pieces     small functions that other scripts hold too, kept equal by a test
     2. Small tools       commands, files, folders
     3. Undoing           one function for each kind of entry in the record
     4. Known services    what can be recognized without a record
     5. Data              the state folder, and when it may be removed
     6. Command line      what is to be undone, shown, confirmed, done
"""
from __future__ import annotations  # OCP needs Python 3.9 or later; Python 3.6 shows this line.

import os
import sys

if sys.version_info < (3, 9):
    sys.exit("OCP needs Python 3.9 or later; this is Python %d.%d." % sys.version_info[:2])
if os.name != "posix":
    sys.exit("OCP runs on Linux and macOS. On Windows, run this inside WSL.")

import argparse
import contextlib
import enum
import functools
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, TextIO

#: A JSON object as the record has it.
Json = dict[str, Any]


# ==== 1. Shared pieces =======================================================
# Each script has to work when it is copied alone, so a few functions are in several of them. A
# test compares everything between "--- shared: NAME" and "--- end shared".


# --- shared: exit
class Exit(enum.IntEnum):
    """The exit codes of OCP's scripts. What was not done never ends with OK."""

    OK = 0
    FAILED = 1
    #: Wrong arguments or settings, or nobody to ask.
    USAGE = 2
    #: No server answers; for the installer: installed, but claude does not answer.
    UNREACHABLE = 3
    #: The key is missing or wrong, or the system requires other rights.
    DENIED = 4
    INTERRUPTED = 130


class Problem(Exception):
    """What went wrong, and what the user can do. `body` is the JSON of a server's refusal."""

    def __init__(self, code: Exit, message: str, body: Any = None) -> None:
        super().__init__(message)
        self.code, self.body = code, body
# --- end shared


# --- shared: run_program
def clean(text: object) -> str:
    """Return `text` without the control characters that could command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", str(text))


class Completed(NamedTuple):
    """How a program ended. A code of None: it did not run to its end, and `error` says why."""

    code: int | None
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """Return its complaint in one line, for a message."""
        lines = [line.strip() for line in f"{self.error}\n{self.output}".splitlines()]
        lines = [clean(line) for line in lines if line] or [f"it ended with {self.code}"]
        if lines[0].startswith("Traceback "):
            return lines[-1]
        # git surrounds its reason with advice.
        reasons = [line for line in lines if line.startswith(("fatal:", "error:"))]
        return (reasons or lines)[0]


def run_program(
    command: Sequence[str], environ: Mapping[str, str], timeout_s: float = 15.0,
    attached: bool = False,
) -> Completed:
    """Run a program to its end. Attached to the terminal, it has no timeout and no output here.

    Otherwise it has no terminal at all, so that it cannot stop there to ask for something. Never
    raises for a program that is missing or too slow.
    """
    pipe, no_input = (None, None) if attached else (subprocess.PIPE, subprocess.DEVNULL)
    try:
        done = subprocess.run(
            list(command), env=dict(environ), stdin=no_input, stdout=pipe, stderr=pipe,
            encoding="utf-8", errors="replace", timeout=None if attached else timeout_s,
            start_new_session=not attached, check=False,
        )
    except subprocess.TimeoutExpired:
        return Completed(None, "", f"{command[0]} took longer than {timeout_s:.0f} s")
    except OSError as error:
        return Completed(None, "", f"{command[0]}: {error.strerror}")
    return Completed(done.returncode, done.stdout or "", done.stderr or "")


def with_user_bus(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with the variable that systemctl --user needs.

    Shells of su, cron and some ssh servers lack it.
    """
    folder = f"/run/user/{os.getuid()}"
    bus = {"XDG_RUNTIME_DIR": folder} if os.path.isdir(folder) else {}
    return {**bus, **environ}
# --- end shared


# --- shared: write_whole
#: Added to the name of a file while it is written. uninstall.py removes what is left of one.
DRAFT = ".ocp-draft"


def write_whole(path: str, content: bytes, mode: int = 0o600) -> None:
    """Replace a file so that after a crash the old or the new one is there, never a part.

    What root writes gets the owner of its folder: the state of a service of the machine belongs
    to the user that it runs as. Raises OSError.
    """
    draft = path + DRAFT
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if os.geteuid() == 0:
        folder = os.stat(os.path.dirname(path))
        os.chown(draft, folder.st_uid, folder.st_gid)
    os.chmod(draft, mode)
    os.replace(draft, path)
# --- end shared


# --- shared: read_record
def ocp_home(environ: Mapping[str, str], home: str) -> str:
    """Return the folder of OCP's state: OCP_HOME, or ~/.ocp."""
    named = environ.get("OCP_HOME", "").strip() or "~/.ocp"
    return os.path.abspath(os.path.join(home, named[2:]) if named.startswith("~/") else named)


def read_record(path: str) -> dict[str, Any] | None:
    """Return the installer's record, install.json; None if there is none.

    Raises ValueError with advice for the user if it cannot be used, OSError if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("actions"), list):
        raise ValueError(f"{path} is damaged. Move it away, and run setup.py_install.py again.")
    if record.get("version") != 1:
        raise ValueError(f"{path} was written by another version of OCP: use its scripts.")
    return record
# --- end shared


# --- shared: os_reason
def os_reason(error: OSError) -> str:
    """Return an error of the system in words: the file, where it is known, and the reason."""
    where = f"{error.filename}: " if isinstance(error.filename, str) else ""
    return f"{where}{error.strerror}" if error.strerror else str(error)
# --- end shared


# --- shared: confirm
def confirm(question: str, yes: bool, stdin: TextIO | None, stdout: TextIO) -> None:
    """Ask before something is changed, unless the user said --yes.

    Raises Problem for any answer but yes, and where nobody can be asked.
    """
    if yes:
        return
    # Whoever started the program may have closed its standard input.
    if stdin is None or not stdin.isatty():
        raise Problem(Exit.USAGE, "There is no terminal to ask on: say --yes, or --dry-run.")
    stdout.write(f"{question} [y/N] ")
    stdout.flush()
    if stdin.readline().strip().lower() not in ("y", "yes"):
        raise Problem(Exit.FAILED, "Nothing was changed.")
# --- end shared


# --- shared: shown_path
def shown_path(path: str, home: str) -> str:
    """Return a path as people write it."""
    return "~" + path[len(home):] if path.startswith(home + os.sep) else path
# --- end shared


# ==== 2. Small tools =========================================================
# What a step needs. "Already gone" is a result, not an error.

_COMMAND_TIMEOUT_S = 90

#: How service managers say that there is nothing to undo.
_ALREADY_GONE = re.compile(
    r"not loaded|does not exist|not found|no such|could not find|not currently loaded", re.I
)


class UndoFailed(Exception):
    """Why a step cannot be undone."""


def run(command: Iterable[str], environ: Mapping[str, str]) -> str:
    """Run a command; return "done" or "already gone". Raises UndoFailed."""
    done = run_program(list(command), {**environ, "LC_ALL": "C"}, _COMMAND_TIMEOUT_S)
    if done.code == 0:
        return "done"
    # "Failed to connect to bus: No such file or directory" is about the manager, not the service.
    text = f"{done.error} {done.output}"
    if done.code is not None and _ALREADY_GONE.search(text) and "connect" not in text:
        return "already gone"
    raise UndoFailed(done.complaint)


def remove_file(path: str) -> bool:
    """Remove a file; return whether there was one. Raises OSError."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_folder(path: str) -> str:
    """Remove a folder if it is empty; return the result for people."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return "already gone"
    except OSError:
        return "kept: there is something in it"
    return "removed"


def checksum(path: str) -> Optional[str]:
    """Return what tells whether a file was changed; None if there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


# ==== 3. Undoing =============================================================
# One function for each kind of entry. It undoes the entry and returns the result for people; what
# is undone already is not an error. KINDS is the table of them.


class Session(NamedTuple):
    """Where the program runs, and what the user asked for."""

    environ: Mapping[str, str]
    home: str
    #: The folder of the record.
    folder: str
    purges: bool
    #: Whether to look for a service of the machine that no record tells of.
    is_system: bool

    @property
    def record_path(self) -> str:
        """Return the path of the installer's record."""
        return os.path.join(self.folder, "install.json")


def undo_run(entry: Json, session: Session) -> str:
    """Undo a command."""
    return run(entry["undo"], session.environ)


def undo_make_dir(entry: Json, session: Session) -> str:
    """Remove a folder that has become empty."""
    return remove_folder(entry["path"])


def undo_write_file(entry: Json, session: Session) -> str:
    """Remove a file, or put back what was there before it."""
    path, backup = str(entry["path"]), str(entry.get("backup") or "")
    found = checksum(path)
    has_backup = bool(backup) and os.path.lexists(backup)
    is_ours = found in entry["sha256"] or (entry.get("data") and session.purges)
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
        run(entry["then"], session.environ)
    return outcome


def undo_move_file(entry: Json, session: Session) -> str:
    """Put a file back where it was."""
    path, backup = str(entry["path"]), str(entry["backup"])
    if not os.path.lexists(backup):
        return "it was never moved" if os.path.lexists(path) else "already gone"
    if os.path.lexists(path):
        return f"kept: there is another one since; {backup} is what was there"
    os.replace(backup, path)
    if entry.get("then"):
        run(entry["then"], session.environ)
    return "put back as it was before"


def clear_drafts(entries: Iterable[Json]) -> None:
    """Remove incomplete files of an interrupted installation."""
    for entry in entries:
        for path in (entry.get("path"), entry.get("backup")):
            if path and entry["kind"] == "write_file":
                remove_file(path + DRAFT)


KINDS: dict[str, Callable[[Json, Session], str]] = {
    "run": undo_run,
    "make_dir": undo_make_dir,
    "write_file": undo_write_file,
    "move_file": undo_move_file,
}


def describe(entry: Json, home: str) -> str:
    """Return one line for people; empty if there is nothing to undo."""
    if entry["kind"] == "run":
        return f"run {shlex.join(entry['undo'])}" if entry.get("undo") else ""
    verb = "put back" if entry["kind"] == "move_file" else "remove"
    return f"{verb} {shown_path(entry['path'], home)}"


def undo(entry: Json, session: Session) -> str:
    """Undo an entry; return the result for people. Raises UndoFailed."""
    try:
        return KINDS[entry["kind"]](entry, session)
    except OSError as error:
        raise UndoFailed(error.strerror or str(error)) from None


# ==== 4. Known services ======================================================
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


def _possible_services(session: Session, system: str) -> Iterator[KnownService]:
    if system != "Darwin":
        config = session.environ.get("XDG_CONFIG_HOME") or os.path.join(session.home, ".config")
        yield from _systemd_units(os.path.join(config, "systemd", "user"), ("systemctl", "--user"))
        if session.is_system:
            yield from _systemd_units("/etc/systemd/system", ("systemctl",))
        return
    for label, is_legacy in KNOWN_AGENTS:
        path = os.path.join(session.home, "Library", "LaunchAgents", f"{label}.plist")
        # On the screen or behind ssh: where it is not, it counts as gone.
        domains = (f"gui/{os.getuid()}", f"user/{os.getuid()}")
        stop = tuple(("launchctl", "bootout", f"{domain}/{label}") for domain in domains)
        yield KnownService(label, path, is_legacy, stop, ())


def known_services(
    session: Session, system: str, entries: Iterable[Json]
) -> list[KnownService]:
    """Return the services that are there, or come back when these entries are undone, recognized by
    the names of their files; without those whose files are removed with the entries."""
    paths: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for entry in entries:
        paths[entry["kind"]].add(entry["path"])
    return [
        each for each in _possible_services(session, system)
        if (os.path.lexists(each.path) or each.path in paths["move_file"])
        and each.path not in paths["write_file"]
    ]


def remove_service(service: KnownService, session: Session) -> str:
    """Stop a service and remove its file. Raises UndoFailed."""
    for command in service.stop:
        run(command, session.environ)
    try:
        remove_file(service.path)
    except OSError as error:
        raise UndoFailed(error.strerror or str(error)) from None
    if service.reload:
        run(service.reload, session.environ)
    return "removed"


# ==== 5. Data ================================================================
# Keys, usage, settings and logs. They stay unless --purge says otherwise, and then only a folder
# goes that looks like ours and holds nobody's home.

_SIGNS = ("install.json", "install.json" + DRAFT, "ocp.env", "ocp.db", "logs", "admin-key")
#: Where a service of the machine keeps its own.
_SYSTEM_FOLDERS = ("/etc/ocp", "/var/lib/ocp")


def data_folders(record: Optional[Json], session: Session) -> list[str]:
    """Return the folders with data that exist, the record's own last."""
    system = _SYSTEM_FOLDERS if session.is_system else ()
    folders = [*system, str((record or {}).get("data_dir") or session.folder), session.folder]
    return [each for each in dict.fromkeys(folders) if os.path.isdir(each)]


def why_kept(folder: str, home: str) -> str:
    """Return why a folder may not be removed with all its content, empty if it may."""
    real, real_home = os.path.realpath(folder), os.path.realpath(home)
    if os.path.commonpath([real, real_home]) == real:
        return "your home is in it"
    if os.path.islink(folder):
        return "it is a link; remove what it leads to by hand"
    names = os.listdir(folder)
    return "it does not look like a folder of OCP" if names and not set(names) & set(_SIGNS) else ""


def purge(folder: str) -> str:
    """Remove a folder with data; return the result for people. Raises UndoFailed."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return "already gone"
    except OSError as error:
        raise UndoFailed(error.strerror or str(error)) from None
    return "removed"


# ==== 6. Command line ========================================================
# What is to be undone, shown, confirmed, done.


def argument_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="uninstall.py",
        description="Removes the OCP service. Its data stays unless --purge is given.",
        epilog="Exit codes: 0 it is gone; 1 something could not be undone, or you said no; "
        "2 nothing was done, the message says why; 130 interrupted.",
    )
    add = parser.add_argument
    add("--purge", action="store_true", help="remove keys, usage, settings and logs too")
    add("--legacy", action="store_true", help="remove services of the original OCP too")
    add("--system", action="store_true",
        help="look for a service of the machine too, if the record of it is lost (as root)")
    add("--dry-run", action="store_true", help="show what would go and change nothing")
    add("--yes", action="store_true", help="do not ask before acting")
    return parser


def this_session(environ: Mapping[str, str], options: argparse.Namespace) -> Session:
    """Return the session as it is. Raises Problem."""
    if options.system and os.getuid() != 0:
        raise Problem(Exit.USAGE, "--system needs root: run it with sudo.")
    home = os.path.abspath(environ.get("HOME") or os.path.expanduser("~"))
    folder = ocp_home(environ, home)
    return Session(with_user_bus(environ), home, folder, options.purge, options.system)


def usable_record(path: str) -> Optional[Json]:
    """Return the installer's record, None if there is none. Raises Problem, OSError."""
    try:
        record = read_record(path)
    except ValueError as error:
        raise Problem(Exit.USAGE, str(error)) from None
    if record and not all(isinstance(entry, dict) and entry.get("kind") in KINDS
                          for entry in record["actions"]):
        raise Problem(
            Exit.USAGE, f"{path} was written by another version of OCP: use its uninstall.py.")
    return record


class Job(NamedTuple):
    """Everything that there is to remove."""

    session: Session
    record: Optional[Json]
    #: The entries to undo, last first.
    entries: list[Json]
    services: list[KnownService]
    legacy: list[KnownService]
    data: list[str]
    #: Folders that --purge does not remove, and why.
    kept: list[str]

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to do."""
        return self.record is None and not (self.services or self.legacy or self.data)


def prepare(session: Session, options: argparse.Namespace, system: str) -> Job:
    """Find what is to be removed; change nothing. Raises Problem."""
    record = usable_record(session.record_path)
    entries = []
    for entry in reversed((record or {"actions": []})["actions"]):
        if session.purges or not entry.get("data"):
            entries.append(entry)
    known = known_services(session, system, entries)
    reasons = {each: why_kept(each, session.home) for each in data_folders(record, session)}
    return Job(
        session, record, entries,
        [each for each in known if not each.is_legacy],
        [each for each in known if each.is_legacy],
        [each for each in reasons if session.purges and not reasons[each]],
        [f"{each}: {reasons[each]}" for each in reasons if session.purges and reasons[each]],
    )


def show(job: Job, options: argparse.Namespace) -> None:
    """Print what will be removed."""
    home = job.session.home
    print("This will be undone:")
    for line in filter(None, (describe(entry, home) for entry in job.entries)):
        print(f"  {line}")
    for service in job.services:
        print(f"  remove the service {service.label} ({shown_path(service.path, home)})")
    for folder in job.data:
        has_original = os.path.exists(os.path.join(folder, "ocp.db.original"))
        more = ", THOSE OF THE ORIGINAL OCP TOO" * has_original
        print(f"  remove {shown_path(folder, home)} WITH ALL KEYS, USAGE, SETTINGS AND LOGS{more}")
    for folder in job.kept:
        print(f"  keep {folder}")
    for service in job.legacy:
        line = f"remove the original's service {service.label}"
        print(f"  {line}" if options.legacy else f"  only with --legacy: {line}")
    sys.stdout.flush()


def attempt(line: str, step: Callable[[], str]) -> bool:
    """Perform one step and print the result; return whether it is done."""
    try:
        print(f"  {line}: {step()}")
    except UndoFailed as problem:
        print(f"  {line}: FAILED: {problem}")
        return False
    finally:
        sys.stdout.flush()
    return True


def undo_all(job: Job) -> bool:
    """Undo the record, removing each entry when it is undone; return whether all went well."""
    record, session = job.record, job.session
    if record is None:
        return True
    left = list(record["actions"])
    clear_drafts(left)
    went_well = True
    for entry in job.entries:
        line = describe(entry, session.home)
        if line and not attempt(line, functools.partial(undo, entry, session)):
            went_well = False
            continue
        left.remove(entry)
        write_whole(session.record_path, json.dumps({**record, "actions": left}).encode("ascii"))
    if went_well:
        remove_file(session.record_path + DRAFT)
        remove_file(session.record_path)
    return went_well


def remove_services(services: Iterable[KnownService], session: Session) -> bool:
    """Remove services that no record tells of; return whether all went well."""
    went_well = True
    for service in services:
        step = functools.partial(remove_service, service, session)
        went_well = attempt(f"the service {service.label}", step) and went_well
    return went_well


def is_unwanted(service: KnownService, options: argparse.Namespace) -> bool:
    """Ask whether a service of the original is to be removed. --yes is no answer to that."""
    if options.legacy or options.yes:
        return bool(options.legacy)
    try:
        question = f"Remove the original's service {service.label} too?"
        confirm(question, False, sys.stdin, sys.stdout)
    except Problem:
        return False
    return True


def legacy_to_remove(job: Job, options: argparse.Namespace) -> list[KnownService]:
    """Return the services of the original that the user wants to remove."""
    chosen = []
    for service in job.legacy:
        if is_unwanted(service, options):
            chosen.append(service)
        else:
            print(f"  the original's {service.label} stays; --legacy removes it")
    return chosen


def remove_data(job: Job) -> bool:
    """Remove the data if asked to, or empty folders; return whether all went well."""
    session = job.session
    went_well = True
    for folder in job.data:
        step = functools.partial(purge, folder)
        went_well = attempt(f"remove {shown_path(folder, session.home)}", step) and went_well
    if os.path.isdir(session.folder) and remove_folder(session.folder) != "removed":
        folder = shown_path(session.folder, session.home)
        print(f"  kept: {folder} with your settings, keys and usage" + (
            "" if session.purges else "; --purge removes it"))
    return went_well


def carry_out(job: Job, options: argparse.Namespace) -> Exit:
    """Show, ask and remove. Raises Problem."""
    session = job.session
    if job.is_empty:
        kept = os.path.isdir(session.folder)
        print("Nothing of OCP's service is left here." + (
            f" Your data is in {shown_path(session.folder, session.home)}; --purge removes it."
            if kept else ""
        ))
        return Exit.OK
    show(job, options)
    if options.dry_run:
        print("Nothing was changed.")
        return Exit.OK
    confirm("Go on?", options.yes, sys.stdin, sys.stdout)
    legacy = legacy_to_remove(job, options)
    went_well = undo_all(job)
    went_well = remove_services([*job.services, *legacy], session) and went_well
    # A record of what could not be undone must not be lost with the data.
    went_well = went_well and remove_data(job)
    print("OCP's service is gone." if went_well else
          "Not everything could be undone. Run this again when the cause is fixed.")
    return Exit.OK if went_well else Exit.FAILED


def main(arguments: list[str], environ: Mapping[str, str], system: str) -> int:
    """Run the program and return the exit code."""
    options = argument_parser().parse_args(arguments)
    try:
        session = this_session(environ, options)
        return carry_out(prepare(session, options, system), options)
    except Problem as problem:
        print(f"uninstall: {problem}", file=sys.stderr)
        return problem.code
    except OSError as error:
        print(f"uninstall: {os_reason(error)}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        print("\nuninstall: interrupted; run this again to go on.", file=sys.stderr)
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, platform.system()))
