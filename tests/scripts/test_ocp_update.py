"""`ocp update`: from release to release over a local remote, and back, whatever happens between."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from depth import by_depth
from ocp_command import HEALTH, ocp, ocp_env, run_env, stub_server, write_record
from processes import Ran
from project import clean_env, load_script

Json = Any
server = load_script("ocp_server")
RELEASES = ("0.1.0", "0.2.0", "0.3.0")
#: The last release says of itself that it would not start.
BROKEN = "0.3.0"
SERVER = """VERSION = "{version}"
import sys
if "--check" in sys.argv:
    print("settings are wrong" if {broken} else "all good", file=sys.stderr)
    sys.exit(2 if {broken} else 0)
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True,
        env=clean_env(HOME="/nonexistent", GIT_CONFIG_NOSYSTEM="1"), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare remote with three releases, and a checkout of the first: remote and tree."""
    folder = tmp_path_factory.mktemp("releases")
    work = folder / "work"
    work.mkdir()
    git(work, "init", "-q", "-b", "main")
    for version in RELEASES:
        text = SERVER.format(version=version, broken=version == BROKEN)
        (work / "ocp_server.py").write_text(text)
        (work / f"only-in-{version}").write_text(version)
        (work / "models.json").write_text("{}")
        git(work, "add", "-A")
        git(work, "commit", "-qm", version)
        # Annotated and plain tags are listed differently.
        git(work, "tag", *(["-am", version] if version == "0.2.0" else []), f"v{version}")
    git(work, "tag", "nightly")
    git(work, "clone", "-q", "--bare", str(work), str(folder / "remote"))
    git(folder, "clone", "-q", "--no-tags", str(folder / "remote"), "tree")
    git(folder / "tree", "reset", "-q", "--hard", "HEAD~2")
    shutil.rmtree(folder / "tree" / ".git" / "hooks")
    (folder / "tree" / ".git" / "hooks").mkdir()
    git(folder / "tree", "fetch", "-q", "origin", "tag", "v0.1.0")
    return folder


class PowerCut(BaseException):
    """The machine is off."""


class UpdateMachine:
    """A checkout, its service and its database. Commands run on it until the power goes."""

    def __init__(self, folder: Path, template: Path, url: str) -> None:
        self.home = folder / "home"
        self.tree = folder / "tree"
        self.url = url
        self.home.mkdir(parents=True)
        shutil.copytree(template / "tree", self.tree)
        write_record(self.home, url, self.tree)
        self.database = self.home / ".ocp" / "ocp.db"
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE notes (text)")
            connection.execute("INSERT INTO notes VALUES ('kept')")
            connection.execute("PRAGMA user_version=1")
            connection.commit()
        #: Releases that do not answer after a start.
        self.dead: set[str] = set()
        self.migrates = False
        self.calls: list[str] = []
        #: Whether a new version is believed untested, for tests that update many times.
        self.is_quick = False
        #: How many steps the power still lasts.
        self.lasts: float = float("inf")
        self.served = ""
        self.started_s = 0.0
        self.start()

    # -- the service -----------------------------------------------------------

    def version(self) -> str:
        return str(ocp.version_of(str(self.tree / "ocp_server.py")))

    def start(self) -> None:
        self.served, self.started_s = self.version(), time.time()
        if self.served == "0.2.0" and self.migrates:
            with contextlib.closing(sqlite3.connect(self.database)) as connection:
                connection.execute("INSERT INTO notes VALUES ('new form')")
                connection.execute("PRAGMA user_version=2")
                connection.commit()

    def health(self, _: object) -> tuple[int, Json]:
        if not self.served or self.served in self.dead:
            return 0, None
        uptime_ms = (time.time() - self.started_s) * 1000
        return 200, {**HEALTH, "version": self.served, "uptime": uptime_ms}

    # -- commands --------------------------------------------------------------

    def step(self) -> None:
        if self.lasts <= 0:
            raise PowerCut
        self.lasts -= 1

    def run(self, command: Sequence[str], *, environ: Mapping[str, str], **options: Any) -> Any:
        words = " ".join(command)
        if command[0] == "systemctl":
            self.step()
            self.calls.append(words)
            if "stop" in command:
                self.served = ""
            else:
                self.start()
            return ocp.Completed(0, "", "")
        if any(f" {verb} " in words for verb in ("fetch", "worktree", "checkout", "--check")):
            self.step()
        if self.is_quick and "--check" in command:
            return ocp.Completed(0, "all good", "")
        return ocp.run_program(
            command, environ={**environ, "GIT_CONFIG_NOSYSTEM": "1"}, **options)

    def ocp(self, *words: str, **more: Any) -> Ran:
        return run_env(ocp_env(self.home, *words, tree=self.tree, run=self.run, **more))

    # -- what there is afterwards ----------------------------------------------

    def states(self) -> list[str]:
        snapshots = ocp.read_snapshots(ocp_env(self.home))
        return [snapshot.journal.state for snapshot in snapshots]

    def notes(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            return [row[0] for row in connection.execute("SELECT text FROM notes")]

    def check(self, *versions: str) -> None:
        """Asserts that all is whole and that one of these versions is there and served."""
        assert self.version() in versions
        assert self.served == self.version()
        assert not set(self.states()) & set(ocp.OPEN_STATES)
        assert git(self.tree, "status", "--porcelain") == ""
        assert len(git(self.tree, "worktree", "list").splitlines()) == 1
        assert git(self.tree, "describe", "--tags") == f"v{self.version()}"
        assert self.notes()[0] == "kept"
        assert self.database.stat().st_mode & 0o777 in (0o600, 0o644)


@contextlib.contextmanager
def machine_of(folder: Path, template: Path) -> Iterator[UpdateMachine]:
    with stub_server() as server:
        machine = UpdateMachine(folder, template, server.url)
        server.answers["GET /health"] = machine.health
        server.answers["GET /settings"] = (200, {"timeout": {"value": 5}})
        yield machine


@pytest.fixture
def machine(tmp_path: Path, template: Path) -> Iterator[UpdateMachine]:
    with machine_of(tmp_path, template) as found:
        yield found


FORWARD = ("update", "--yes", "--target", "v0.2.0")


# ---------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------

def test_forward_with_everything_saved_first(machine: UpdateMachine) -> None:
    (machine.tree / ".git" / "info").mkdir(exist_ok=True)
    (machine.tree / ".git" / "info" / "exclude").write_text("ocp.py\n")
    (machine.tree / "ocp.py").write_text("# the program that updates\n")
    found = machine.ocp(*FORWARD)
    assert found.code == 0 and "updated to v0.2.0" in found.stdout, found
    machine.check("0.2.0")
    assert machine.states() == ["done"]
    assert machine.calls == ["systemctl --user restart ocp.service"]
    snapshot = ocp.read_snapshots(ocp_env(machine.home))[0]
    names = set(os.listdir(snapshot.folder))
    assert names == {"journal.json", "ocp.db", "ocp.py"}
    for name in names:
        assert os.stat(snapshot.path(name)).st_mode & 0o777 == 0o600, name
    assert os.stat(snapshot.folder).st_mode & 0o777 == 0o700


def test_the_snapshot_has_rows_that_were_only_in_the_write_ahead_log(
    machine: UpdateMachine
) -> None:
    with contextlib.closing(sqlite3.connect(machine.database)) as busy:
        busy.execute("PRAGMA wal_autocheckpoint=0")
        busy.execute("INSERT INTO notes VALUES ('in the log')")
        busy.commit()
        assert machine.ocp(*FORWARD).code == 0
    saved = ocp.read_snapshots(ocp_env(machine.home))[0].path("ocp.db")
    with contextlib.closing(sqlite3.connect(saved)) as copy:
        assert ("in the log",) in copy.execute("SELECT text FROM notes").fetchall()


def test_already_there(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    again = machine.ocp(*FORWARD)
    assert again.code == 0 and "nothing newer" in again.stdout
    assert machine.states() == ["done"] and len(machine.calls) == 1


def test_what_is_wrong_before_an_update_does_not_forbid_it(machine: UpdateMachine) -> None:
    broken = machine.run

    def run(command: Sequence[str], **options: Any) -> Any:
        if "--check" in command:
            return ocp.Completed(2, "", "ocp: The claude program was not found")
        return broken(command, **options)

    found = run_env(ocp_env(machine.home, *FORWARD, tree=machine.tree, run=run))

    assert found.code == 0 and "The claude program was not found" in found.stderr, found
    machine.check("0.2.0")


# -- what a release is verified with ------------------------------------------

def tagged_machine(folder: Path, url: str, signers: str, *tag: str) -> UpdateMachine:
    """A checkout of 0.1.0 whose remote offers 0.2.0, tagged with these options of git tag."""
    work = folder / "releases" / "work"
    (work / "tools").mkdir(parents=True)
    git(work, "init", "-q", "-b", "main")
    if signers:
        (work / "tools" / "allowed_signers").write_text(signers)
    for version in ("0.1.0", "0.2.0"):
        (work / "ocp_server.py").write_text(SERVER.format(version=version, broken=False))
        git(work, "add", "-A")
        git(work, "commit", "-qm", version)
        git(work, *(("tag", "v0.1.0") if version == "0.1.0" else ("-c", "gpg.format=ssh", *tag)))
    git(folder / "releases", "clone", "-q", "--no-tags", str(work), "tree")
    git(folder / "releases" / "tree", "reset", "-q", "--hard", "HEAD~1")
    git(folder / "releases" / "tree", "fetch", "-q", "origin", "tag", "v0.1.0")
    return UpdateMachine(folder / "machine", folder / "releases", url)


@pytest.fixture
def tagged(tmp_path: Path) -> Iterator[Any]:
    """Makes a tagged_machine."""
    with stub_server() as server:
        def make(*words: str, signers: str = "") -> UpdateMachine:
            machine = tagged_machine(tmp_path, server.url, signers, *words)
            server.answers["GET /health"] = machine.health
            server.answers["GET /settings"] = (200, {"timeout": {"value": 5}})
            return machine
        yield make


def sum_line(version: str, name: str = "ocp_server.py") -> str:
    content = SERVER.format(version=version, broken=False).encode()
    return f"{hashlib.sha256(content).hexdigest()}  {name}"


def test_a_release_with_nothing_to_verify_it_with_says_so(machine: UpdateMachine) -> None:
    found = machine.ocp(*FORWARD)
    assert found.code == 0
    assert "no signature to verify" in found.stdout and "names no sums" in found.stdout


def test_the_sums_in_a_tag_are_compared(tagged: Any) -> None:
    machine = tagged("tag", "-am", f"OCP\n\n{sum_line('0.2.0')}\n{'0' * 64}  ocp-0.2.0.tar.gz",
                     "v0.2.0")
    found = machine.ocp(*FORWARD)
    assert found.code == 0, found
    assert "1 file of v0.2.0 compared with the sums in its tag" in found.stdout


def test_a_file_without_the_sum_that_the_tag_names_is_not_installed(tagged: Any) -> None:
    machine = tagged("tag", "-am", f"OCP\n\n{sum_line('0.1.0')}", "v0.2.0")
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "does not have the sum that the tag names" in found.stderr
    machine.check("0.1.0")


@pytest.fixture
def signing_keys(tmp_path: Path) -> tuple[Path, Path]:
    """Two keys of ssh."""
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    keys = (tmp_path / "good-key", tmp_path / "other-key")
    for key in keys:
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
    return keys


@pytest.mark.parametrize("tag, said", [
    ("signed", "signed by a key of"), ("by another", "not signed by any key"),
    ("not signed", "not signed by any key"), ("plain", "not signed by any key"),
    ("of another release", "was signed as another release")])
def test_a_signature_is_wanted_where_signers_are_named(
    tagged: Any, signing_keys: tuple[Path, Path], tag: str, said: str
) -> None:
    good, other = (f"user.signingkey={key}" for key in signing_keys)
    words = {
        "signed": ("-c", good, "tag", "-sm", "x", "v0.2.0"),
        "by another": ("-c", other, "tag", "-sm", "x", "v0.2.0"),
        "not signed": ("tag", "-am", "x", "v0.2.0"), "plain": ("tag", "v0.2.0"),
        "of another release": ("-c", good, "tag", "-sm", "x", "v0.1.9")}[tag]
    public = signing_keys[0].with_suffix(".pub").read_text()
    machine = tagged(*words, signers=f"maintainer@example.org {public}")
    if tag == "of another release":
        work = machine.home.parent.parent / "releases" / "work"
        git(work, "update-ref", "refs/tags/v0.2.0", "refs/tags/v0.1.9")

    found = machine.ocp(*FORWARD)

    assert said in (found.stdout + found.stderr), found
    assert found.code == (0 if tag == "signed" else 1)
    machine.check("0.2.0" if tag == "signed" else "0.1.0")


def test_an_old_git_that_cannot_verify_is_told(
    tagged: Any, signing_keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocp, "_VERIFYING_GIT", (99, 0))
    found = tagged("tag", "v0.2.0", signers="maintainer@example.org x").ocp(*FORWARD)
    assert found.code == 0 and "its signature was not verified" in found.stdout


def test_a_check_leaves_the_newest_release_for_the_dashboard(machine: UpdateMachine) -> None:
    note = machine.home / ".ocp/newest-release"
    machine.ocp("update", "--check", "--target", "v0.2.0")
    assert not note.exists()
    machine.ocp("update", "--check")
    assert note.read_text() == "0.3.0\n"
    # The release was withdrawn.
    empty = machine.home / "empty"
    git(machine.home, "init", "-q", "--bare", str(empty))
    git(machine.tree, "remote", "set-url", "origin", str(empty))
    machine.ocp("update", "--check")
    assert not note.exists()


def test_a_remote_without_any_release_is_told_as_that(machine: UpdateMachine) -> None:
    empty = machine.home / "empty"
    git(machine.home, "init", "-q", "--bare", str(empty))
    git(machine.tree, "remote", "set-url", "origin", str(empty))
    for words in (("update", "--check"), ("update", "--yes")):
        found = machine.ocp(*words)
        assert found.code == 0 and "the remote has no release yet" in found.stdout, found
    git(machine.tree, "remote", "remove", "origin")
    found = machine.ocp("update", "--check")
    assert found.code == 1 and "has no remote named origin" in found.stderr


def test_a_remote_that_cannot_be_reached_is_told_in_the_words_of_git(
    machine: UpdateMachine
) -> None:
    for address in (f"file://{machine.home}/nowhere", "https://127.0.0.1:1/x"):
        git(machine.tree, "remote", "set-url", "origin", address)
        found = machine.ocp("update", "--check")
        assert found.code == 1 and "failed: fatal: " in found.stderr, found
        assert "the repository exists" not in found.stderr


def test_check_and_dry_run_change_nothing(machine: UpdateMachine) -> None:
    before = git(machine.tree, "for-each-ref")
    check = machine.ocp("update", "--check")
    assert check.code == 0 and "installed v0.1.0, v0.3.0 is available" in check.stdout
    dry = machine.ocp("update", "--dry-run", "--target", "0.2.0")
    assert dry.code == 0 and "v0.1.0 -> v0.2.0" in dry.stdout
    assert git(machine.tree, "for-each-ref") == before
    assert machine.states() == [] and machine.calls == []


def test_a_person_is_asked_and_may_say_no(machine: UpdateMachine) -> None:
    words = ("update", "--target", "v0.2.0")
    assert machine.ocp(*words).code == ocp.Exit.USAGE
    no = machine.ocp(*words, terminal=True, stdin="n\n")
    assert no.code == 1 and "Nothing was changed" in no.stderr
    machine.check("0.1.0")
    assert machine.ocp(*words, terminal=True, stdin="y\n").code == 0
    machine.check("0.2.0")


@pytest.mark.parametrize("target, code, message", [
    ("v9.9.9", 1, "no release v9.9.9"), ("nightly", 2, "not a version"),
    ("; rm -rf", 2, "not a version"),
    ("--upload-pack=x", 2, ""), ("v0.1", 2, "not a version"),
])
def test_targets_that_are_none(
    machine: UpdateMachine, target: str, code: int, message: str
) -> None:
    found = machine.ocp("update", "--yes", "--target", target)
    assert found.code == code and message in found.stderr
    machine.check("0.1.0")


def test_an_older_target_is_no_update(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    found = machine.ocp("update", "--yes", "--target", "v0.1.0")
    assert found.code == 1 and "--rollback" in found.stderr
    machine.check("0.2.0")


# ---------------------------------------------------------------------------
# Not forward
# ---------------------------------------------------------------------------

def test_never_over_local_changes(machine: UpdateMachine) -> None:
    (machine.tree / "models.json").write_text("mine")
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "local changes: models.json" in found.stderr
    assert (machine.tree / "models.json").read_text() == "mine"
    assert machine.states() == [] and machine.calls == []


def test_never_over_commits_of_ones_own(machine: UpdateMachine) -> None:
    git(machine.tree, "commit", "-q", "--allow-empty", "-m", "mine")
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "commits of its own" in found.stderr
    assert machine.states() == []


@pytest.mark.parametrize("ignored", [False, True])
def test_a_file_that_would_be_overwritten_is_not(machine: UpdateMachine, ignored: bool) -> None:
    (machine.tree / "only-in-0.2.0").write_text("mine")
    if ignored:
        (machine.tree / ".git" / "info" / "exclude").write_text("only-in-*\n")
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "Nothing was changed" in found.stderr
    assert (machine.tree / "only-in-0.2.0").read_text() == "mine"
    assert machine.version() == "0.1.0" and machine.states() == ["refused"]
    assert machine.calls == []


def test_a_release_that_would_not_start_is_not_installed(machine: UpdateMachine) -> None:
    found = machine.ocp("update", "--yes")
    assert found.code == 1 and "settings are wrong" in found.stderr
    assert "nothing was changed" in found.stderr
    machine.check("0.1.0")
    assert machine.states() == ["refused"] and machine.calls == []


def test_a_server_that_does_not_come_back_brings_the_old_one_back(machine: UpdateMachine) -> None:
    machine.dead = {"0.2.0"}
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "does not answer" in found.stderr and "rolled back" in found.stdout
    machine.check("0.1.0")
    assert machine.states() == ["undone"]
    assert git(machine.tree, "rev-parse", "--abbrev-ref", "HEAD") == "main"


def test_a_database_in_the_new_form_is_put_back(machine: UpdateMachine) -> None:
    machine.dead, machine.migrates = {"0.2.0"}, True
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "newer-ocp.db" in found.stderr
    machine.check("0.1.0")
    assert machine.notes() == ["kept"]
    verbs = [call.split()[2] for call in machine.calls]
    assert verbs == ["restart", "stop", "restart"]
    assert ocp.database_version(str(machine.database)) == 1
    snapshot = ocp.read_snapshots(ocp_env(machine.home))[0]
    assert not os.path.exists(snapshot.path("ocp.db-wal"))
    newer = snapshot.path("newer-ocp.db")
    assert ocp.database_version(newer) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_database_that_is_put_back_belongs_to_the_user_of_the_service(
    machine: UpdateMachine
) -> None:
    for path in [machine.database.parent, *machine.database.parent.glob("ocp.db*")]:
        os.chown(path, 12345, 23456)
    machine.dead, machine.migrates = {"0.2.0"}, True
    assert machine.ocp(*FORWARD).code == 1
    assert machine.notes() == ["kept"]
    assert (machine.database.stat().st_uid, machine.database.stat().st_gid) == (12345, 23456)


def test_no_log_of_another_database_is_played_into_the_saved_one(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    snapshot = ocp.read_snapshots(ocp_env(machine.home))[0]
    with contextlib.closing(sqlite3.connect(machine.database)) as dead_server:
        dead_server.execute("PRAGMA wal_autocheckpoint=0")
        dead_server.execute("INSERT INTO notes VALUES ('only in the log')")
        dead_server.commit()
        ocp.put_back_database(snapshot)
        assert not list(machine.database.parent.glob("ocp.db-*"))
        with contextlib.closing(sqlite3.connect(snapshot.path("newer-ocp.db"))) as kept:
            assert ("only in the log",) in kept.execute("SELECT text FROM notes").fetchall()
    assert machine.notes() == ["kept"]


def test_a_database_is_put_back_once(machine: UpdateMachine) -> None:
    machine.dead, machine.migrates = {"0.2.0"}, True
    run = machine.run

    def cut_at_last_restart(command: Sequence[str], **options: Any) -> Any:
        if "restart" in command and machine.calls[-1:] and "stop" in machine.calls[-1]:
            raise PowerCut
        return run(command, **options)

    machine.run = cut_at_last_restart  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        machine.ocp(*FORWARD)
    machine.run = run  # type: ignore[method-assign]
    machine.start()
    with contextlib.closing(sqlite3.connect(machine.database)) as connection:
        connection.execute("INSERT INTO notes VALUES ('since the boot')")
        connection.commit()
    assert machine.ocp("update", "--yes").code == 1
    machine.check("0.1.0")
    assert machine.notes() == ["kept", "since the boot"]


def test_a_first_database_in_the_new_form_is_put_away(machine: UpdateMachine) -> None:
    for path in machine.database.parent.glob("ocp.db*"):
        path.unlink()
    machine.dead, machine.migrates = {"0.2.0"}, True

    def start() -> None:
        machine.served, machine.started_s = machine.version(), time.time()
        with contextlib.closing(sqlite3.connect(machine.database)) as connection:
            newest = max(int(connection.execute("PRAGMA user_version").fetchone()[0]),
                         2 if machine.served == "0.2.0" else 1)
            connection.execute(f"PRAGMA user_version={newest}")

    machine.start = start  # type: ignore[method-assign]
    assert machine.ocp(*FORWARD).code == 1
    assert ocp.database_version(str(machine.database)) == 1


def test_an_old_process_that_goes_on_answering_is_no_success(machine: UpdateMachine) -> None:
    machine.start = lambda: None  # type: ignore[method-assign]
    machine.started_s -= 100
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "older server" in found.stderr
    assert machine.version() == "0.1.0" and machine.states() == ["undone"]


def test_a_database_that_cannot_be_saved_stops_it_all(machine: UpdateMachine) -> None:
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{machine.database}{suffix}")
    machine.database.write_text("not a database, but long enough to be taken for one " * 50)
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "cannot be saved" in found.stderr
    assert machine.version() == "0.1.0" and machine.states() == []


def test_what_is_no_checkout_is_explained(tmp_path: Path) -> None:
    (tmp_path / "ocp_server.py").write_text('VERSION = "0.1.0"\n')
    found = run_env(ocp_env(tmp_path, "update", "--yes", tree=tmp_path))
    assert found.code == 1 and "Update it by hand" in found.stderr


def test_a_remote_that_cannot_be_asked_is_not_up_to_date(machine: UpdateMachine) -> None:
    git(machine.tree, "remote", "set-url", "origin", str(machine.home / "gone"))
    for words in (("update", "--check"), FORWARD):
        found = machine.ocp(*words)
        assert found.code == 1 and "ls-remote" in found.stderr


def test_a_service_of_another_tree_is_not_restarted_for_nothing(machine: UpdateMachine) -> None:
    write_record(machine.home, machine.url, machine.home)
    found = machine.ocp(*FORWARD)
    assert found.code == 1 and "is not in" in found.stderr
    machine.check("0.1.0")


def test_without_a_service_the_files_are_updated_and_it_says_so(machine: UpdateMachine) -> None:
    (machine.home / ".ocp" / "install.json").unlink()
    found = machine.ocp(*FORWARD)
    assert found.code == 0 and "restart it yourself" in found.stdout
    assert machine.version() == "0.2.0" and machine.calls == []


def test_one_update_at_a_time(machine: UpdateMachine) -> None:
    with ocp.update_lock(ocp_env(machine.home)):
        found = machine.ocp(*FORWARD)
    assert found.code == 1 and "Another" in found.stderr


def test_git_is_not_led_elsewhere(machine: UpdateMachine) -> None:
    hook = machine.tree / ".git" / "hooks" / "post-checkout"
    hook.write_text("#!/bin/sh\ntouch hooked\n")
    hook.chmod(0o755)
    found = machine.ocp(*FORWARD, environ={"GIT_DIR": "/nonexistent", "GIT_WORK_TREE": "/"})
    assert found.code == 0, found
    assert not (machine.tree / "hooked").exists()


# ---------------------------------------------------------------------------
# Back
# ---------------------------------------------------------------------------

def test_back_to_where_it_came_from(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    listed = machine.ocp("update", "--rollback", "--list")
    assert listed.code == 0 and "v0.1.0" in listed.stdout and "done" in listed.stdout
    assert machine.ocp("update", "--rollback", "--dry-run").code == 0
    assert machine.ocp("update", "--rollback").code == ocp.Exit.USAGE
    machine.check("0.2.0")
    found = machine.ocp("update", "--rollback", "--yes")
    assert found.code == 0 and "rolled back to v0.1.0" in found.stdout
    machine.check("0.1.0")
    again = machine.ocp("update", "--rollback", "--yes")
    assert again.code == 1 and "no finished update" in again.stderr


def test_back_from_a_database_with_tenants_to_one_from_before_and_forward_again(
    machine: UpdateMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = next(number for number, each in enumerate(server.MIGRATIONS)
                  if "ADD COLUMN login" in each)
    machine.database.unlink()

    def start() -> None:
        """As a server of the version that is there uses its database."""
        machine.served, machine.started_s = machine.version(), time.time()
        migrations = server.MIGRATIONS[:before if machine.served == "0.1.0" else None]
        monkeypatch.setattr(server, "MIGRATIONS", migrations)
        with contextlib.closing(server.Store(str(machine.database))) as store:
            if machine.served == "0.2.0":
                keys = server.Keys(store, time.time)
                key, _ = keys.create(f"alice-{len(keys.all())}", {})
                keys.set_tenant(key, lambda _: server.Tenant(f"folder-{key.id}"))
        monkeypatch.undo()

    machine.start = start  # type: ignore[method-assign]
    start()
    assert machine.ocp(*FORWARD).code == 0
    with contextlib.closing(sqlite3.connect(machine.database)) as connection:
        assert connection.execute("SELECT folder FROM tenants").fetchall() == [("folder-1",)]

    assert machine.ocp("update", "--rollback", "--yes").code == 0

    assert ocp.database_version(str(machine.database)) == before
    with contextlib.closing(sqlite3.connect(machine.database)) as connection:
        assert connection.execute("SELECT name FROM keys").fetchall() == []
    newer = ocp.read_snapshots(ocp_env(machine.home))[0].path("newer-ocp.db")
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        assert connection.execute("SELECT folder FROM tenants").fetchall() == [("folder-1",)]
    assert machine.ocp(*FORWARD).code == 0
    assert ocp.database_version(str(machine.database)) == len(server.MIGRATIONS)


def test_rows_written_since_are_kept_when_the_form_is_the_same(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    with contextlib.closing(sqlite3.connect(machine.database)) as connection:
        connection.execute("INSERT INTO notes VALUES ('since')")
        connection.commit()
    assert machine.ocp("update", "--rollback", "--yes").code == 0
    assert machine.notes() == ["kept", "since"]


def test_back_is_not_over_local_changes_either(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    (machine.tree / "models.json").write_text("mine")
    found = machine.ocp("update", "--rollback", "--yes")
    assert found.code == 1 and "left alone" in found.stderr
    assert (machine.tree / "models.json").read_text() == "mine"


def test_a_branch_that_has_moved_is_not_moved_back(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    git(machine.tree, "branch", "-f", "main", "v0.2.0")
    assert machine.ocp("update", "--rollback", "--yes").code == 0
    machine.check("0.1.0")
    assert git(machine.tree, "rev-parse", "main") == git(machine.tree, "rev-parse", "v0.2.0^{}")


def test_old_snapshots_go_and_unfinished_ones(machine: UpdateMachine) -> None:
    folder = Path(ocp.snapshots_folder(ocp_env(machine.home)))
    journal = ocp.Journal("done", str(machine.tree), "", "a", "", "0.0.1", "b", "0.0.2", "")
    for number in range(8):
        (folder / f"2020010{number}T000000Z").mkdir(parents=True)
        ocp.Snapshot(str(folder / f"2020010{number}T000000Z"), journal).at("done")
    (folder / "20200109T000000Z.partial").mkdir()
    assert machine.ocp(*FORWARD).code == 0
    assert len(machine.states()) == 5 and not list(folder.glob("*.partial"))


# ---------------------------------------------------------------------------
# Power cuts
# ---------------------------------------------------------------------------

def with_power_for(machine: UpdateMachine, steps: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Updates until the power goes after so many steps, and boots again; whether it went."""
    real_replace, real_rename, real_rmtree = os.replace, os.rename, shutil.rmtree

    def replace(source: str, target: str) -> None:
        machine.step()
        real_replace(source, target)

    def rename(source: str, target: str) -> None:
        machine.step()
        real_rename(source, target)

    def rmtree(path: str, **options: Any) -> None:
        machine.step()
        real_rmtree(path, **options)

    machine.lasts, machine.is_quick = steps, True
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(os, "rename", rename)
            patch.setattr(os, "fsync", lambda descriptor: None)
            patch.setattr(shutil, "rmtree", rmtree)
            machine.ocp(*FORWARD)
        return False
    except PowerCut:
        return True
    finally:
        machine.lasts = float("inf")
        machine.start()


#: From one step at which the power is cut to the next one that is tried.
STRIDE = by_depth(3, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_a_power_cut_between_any_two_steps_is_recovered_from(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch, back: bool,
) -> None:
    cut, steps = True, 0
    while cut:
        with machine_of(tmp_path / str(steps), template) as machine:
            cut = with_power_for(machine, steps, monkeypatch)
            interrupted = bool(set(machine.states()) & set(ocp.OPEN_STATES))
            words = ("update", "--rollback", "--yes") if back else FORWARD
            found = machine.ocp(*words)
            if interrupted:
                assert "was interrupted" in found.stderr
            # The boot after the cut may have found files of either release.
            machine.check("0.1.0", "0.2.0")
            if back and cut:
                machine.check("0.1.0")
            if not back and machine.version() != "0.2.0":
                machine.ocp(*FORWARD)
                machine.check("0.2.0")
        steps += STRIDE
    assert steps >= 12


@pytest.mark.slow
def test_a_power_cut_on_the_way_back_is_recovered_from(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut, steps = True, 14
    while cut:
        with machine_of(tmp_path / str(steps), template) as machine:
            machine.dead, machine.migrates = {"0.2.0"}, True
            cut = with_power_for(machine, steps, monkeypatch)
            machine.ocp("update", "--rollback", "--yes")
            machine.check("0.1.0")
            assert machine.notes() == ["kept"], steps
        steps += STRIDE
    assert steps >= 21


def test_a_checkout_that_was_torn_is_undone(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    snapshot = ocp.read_snapshots(ocp_env(machine.home))[0].at("switching", is_torn=True)
    git(machine.tree, "checkout", "-q", "main")
    (machine.tree / "ocp_server.py").write_text('VERSION = "0.2')
    (machine.tree / "models.json").unlink()
    lock = machine.tree / ".git" / "index.lock"
    lock.write_text("")
    os.utime(lock, (0, 0))
    found = machine.ocp("update", "--yes")
    assert found.code == 1 and "Undoing it" in found.stderr, found
    machine.check("0.1.0")
    assert json.loads(Path(snapshot.path("journal.json")).read_text())["state"] == "undone"


#: What ocp_connect.py of a release prints and how it ends, and what `ocp update` says then.
OPENCLAWS = {
    "changed": ('{"openclaw": true, "providers": ["o"], "diff": ["+"], "written": ["f"], '
                '"failures": []}', 0,
                "OpenClaw has the models of this version now", ""),
    "fine": ('{"openclaw": true, "providers": [], "diff": [], "written": [], "failures": []}',
             0, "", ""),
    "refused": ('{"openclaw": true, "providers": ["o"], "diff": ["+"], "written": [], '
                '"failures": ["f is read-only"]}', 1,
                "", "f is read-only. Try again with: ocp sync"),
    "other": ('{"diff": []}', 0, "", "was not checked"),
    "broken": ("no JSON", 1, "", "was not checked"),
}


@pytest.mark.parametrize("case", sorted(OPENCLAWS))
def test_openclaw_is_told_of_the_models_and_cannot_stop_an_update(
    machine: UpdateMachine, case: str,
) -> None:
    printed, code, out, err = OPENCLAWS[case]
    # No release has the script; a file of the user's own is not in the way of any.
    (machine.tree / ".git" / "info").mkdir(exist_ok=True)
    (machine.tree / ".git" / "info" / "exclude").write_text("ocp_connect.py\nseen\n")
    (machine.tree / "ocp_connect.py").write_text(
        f"import sys\nopen({str(machine.tree / 'seen')!r}, 'a').write(str(sys.argv[1:]))\n"
        f"print({printed!r})\nsys.exit({code})\n")

    found = machine.ocp(*FORWARD)
    back = machine.ocp("update", "--rollback", "--yes")

    assert found.code == 0 and back.code == 0
    assert out in found.stdout and err in found.stderr and (out or "OpenClaw" not in found.stdout)
    assert (machine.tree / "seen").read_text() == 2 * f"['--sync', '{machine.url}', '--json']"
    machine.check("0.1.0")


def test_the_copy_of_ocp_in_a_snapshot_finishes_the_work(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    snapshot = ocp.read_snapshots(ocp_env(machine.home))[0].at("switched")
    env = ocp_env(machine.home, "update", "--rollback", "--yes", tree=Path(snapshot.folder),
                run=machine.run)
    found = run_env(env)
    assert found.code == 0 and "rolled back to v0.1.0" in found.stdout
    machine.check("0.1.0")


def test_looking_does_not_recover(machine: UpdateMachine) -> None:
    assert machine.ocp(*FORWARD).code == 0
    ocp.read_snapshots(ocp_env(machine.home))[0].at("switched")
    found = machine.ocp("update", "--dry-run")
    assert found.code == 1 and "interrupted" in found.stderr
    assert machine.states() == ["switched"]
